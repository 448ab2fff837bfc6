//! The life of a worker: addresses bound, servers up, then one registration after the other until it is to leave.

use std::net::IpAddr;
use std::sync::Arc;

use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;
use tracing::{info, warn};
use uuid::Uuid;

use super::backend::WorkerBackend;
use super::driver::{Driver, End, Inputs, NANNY, WORKER};
use super::nanny::Nanny;
use super::plugins::{self, Role};
use super::report::at_rest;
use super::requests::Command;
use super::shared::{Parts, Shared};
use super::{Config, Error, Listen, Stop, StopSignal};
use crate::exec::{self, NannyState, WorkerInfo};
use crate::net::{self, Listener};
use crate::peer::{self, Peer};
use crate::proto::{Address, Status, Value};
use crate::scheduler::{Attempt, Identity, Name, Scheduler, Session};
use crate::telemetry::log::Recent;
use crate::telemetry::{self, Pulse};

/// A worker with its servers up.
struct Worker {
    shared: Arc<Shared>,
    commands: mpsc::UnboundedReceiver<Command>,
    stop: StopSignal,
    nanny: Option<Role>,
    /// What nanny plugins have done so far, for the next pool.
    nanny_state: NannyState,
    /// Dropped, they close their listeners and connections, and spill no more.
    _servers: JoinSet<()>,
    _http: Option<telemetry::http::Server>,
}

/// Runs a worker until it is told to stop, by `stop` or by the scheduler.
///
/// # Errors
/// [`Error`]: what keeps it from going on. Everything it started is ended then, too.
pub async fn run(config: Config, recent: Recent, mut stop: StopSignal) -> Result<(), Error> {
    let mut stopped = stop.clone();
    let started = tokio::select! {
        started = Worker::start(config, recent, stop.clone()) => started?,
        () = told(&mut stopped) => return Ok(()),
    };
    stop.mark_unchanged();
    started.live().await
}

/// Keeps the pulse while there is no driver: waiting for a scheduler is no fault of ours. Never ends.
async fn turn(pulse: &Pulse) {
    loop {
        pulse.tick();
        tokio::time::sleep(pulse.interval()).await;
    }
}

/// Waits for any wish to stop.
async fn told(stop: &mut StopSignal) {
    // whoever could tell us is gone: that is a wish to stop, too
    let _ = stop.wait_for(|wish| *wish > Stop::No).await;
}

async fn bind(listen: &Listen, config: &Arc<net::Config>) -> Result<Listener, Error> {
    let host = listen.host.as_deref().unwrap_or("");
    let mut last = None;
    for port in &listen.ports {
        match Listener::bind(host, *port..=*port, config.clone()).await {
            Ok(listener) => return Ok(listener),
            Err(error) => last = Some(error),
        }
    }
    match last {
        Some(source) => Err(Error::Listen { ports: listen.ports.clone(), source }),
        None => Err(Error::NoPorts),
    }
}

impl Worker {
    async fn start(config: Config, recent: Recent, stop: StopSignal) -> Result<Self, Error> {
        let net = Arc::new(config.net.clone());
        let peers = net::Pool::new(net.clone());
        let metrics = telemetry::Metrics::default();
        let pulse = config.pulse.clone();
        let scheduler = Scheduler::new(config.scheduler.clone(), peers.clone(), metrics.clone());

        let listener = bind(&config.listen, &net).await?;
        let found = scheduler.locate().await?;
        let own = net::local_ip_towards(found.host()).await;
        let own = own.map_err(|source| Error::OwnAddress { scheduler: found, source })?;
        let address = config.contact_address.clone().unwrap_or_else(|| listener.contact_address(own));
        let nanny = match &config.nanny {
            Some(listen) => Some(bind(&nanny_listen(listen, own), &net).await?),
            None => None,
        };
        let nanny_address = nanny.as_ref().map(|listener| listener.contact_address(own));
        let name = config.name.clone().unwrap_or_else(|| Name::Text(address.as_str().into()));
        let http = match &config.dashboard {
            Some(endpoints) => {
                let facts = facts(&name, &address);
                let server = telemetry::http::Server::start(endpoints, &metrics, pulse.clone(), facts);
                Some(server.map_err(Error::Http)?)
            }
            None => None,
        };
        let identity = Identity {
            address: address.clone(),
            name,
            nthreads: config.state.nthreads,
            memory_limit: config.memory_limit,
            resources: config.state.resources.clone(),
            local_directory: config.local_directory.clone(),
            services: http.iter().map(|server| ("dashboard".into(), server.address().port())).collect(),
            nanny: nanny_address.clone(),
            versions: config.interpreter.versions(&[]),
            server_id: Identity::new_server_id(),
        };
        let (sender, commands) = mpsc::unbounded_channel();
        let listening = listener.listen_address();
        let parts = Parts { config, identity, scheduler, peers, recent, metrics, pulse, commands: sender };
        let shared = Arc::new(Shared::new(parts));
        let mut servers = JoinSet::new();
        servers.spawn(shared.store.clone().keep_spilling());
        servers.spawn(peer::serve(listener, Arc::new(server(&shared, address))));
        let nanny_id: Arc<str> = format!("Nanny-{}", Uuid::new_v4()).into();
        if let Some(listener) = nanny {
            let blocked = shared.config.nanny_blocked_handlers.clone();
            let nanny = Nanny { shared: shared.clone(), id: nanny_id.clone() };
            servers.spawn(peer::serve_nanny(listener, nanny, blocked));
        }
        let nanny = nanny_address.map(|address| Role::new(address, nanny_id));
        let mut nanny_state = shared.config.exec.nanny.clone();
        if nanny.is_some() {
            // where plugins of the nanny put what workers are to import
            let scratch = shared.config.local_directory.parent();
            nanny_state.path.extend(scratch.map(|scratch| scratch.to_string_lossy().into_owned()));
        }
        let worker = Worker { shared, commands, stop, nanny, nanny_state, _servers: servers, _http: http };
        worker.announce(&listening);
        Ok(worker)
    }

    /// The lines a stock worker begins its log with.
    fn announce(&self, listening: &Address) {
        let identity = self.shared.identity();
        if let Some(nanny) = &self.nanny {
            info!(target: NANNY, "        Start Nanny at: '{}'", nanny.address);
        }
        info!(target: WORKER, "      Start worker at: {:>26}", identity.address.as_str());
        info!(target: WORKER, "         Listening to: {:>26}", listening.as_str());
        info!(target: WORKER, "          Worker name: {:>26}", identity.name.to_string());
        for (name, port) in &identity.services {
            let at = format!("{}:{port}", identity.address.host());
            info!(target: WORKER, "{:>21}: {at:>26}", format!("{name} at"));
        }
        info!(target: WORKER, "              Threads: {:>26}", identity.nthreads);
        if let Some(limit) = identity.memory_limit {
            let gib = format!("{:.2} GiB", limit as f64 / f64::from(1 << 30));
            info!(target: WORKER, "               Memory: {gib:>26}");
        }
        info!(target: WORKER, "      Local Directory: {:>26}", identity.local_directory.display());
        info!(target: WORKER, "{}", "-".repeat(49));
        if let Some(scheduler) = self.shared.scheduler.address() {
            info!(target: WORKER, "Waiting to connect to: {:>26}", scheduler.as_str());
        }
    }

    /// Registers again and again.
    async fn live(mut self) -> Result<(), Error> {
        let mut attempt = Attempt::First;
        let mut waiting: Option<oneshot::Sender<()>> = None;
        loop {
            let (events, outcomes) = mpsc::unbounded_channel();
            let nanny = self.nanny_state.clone();
            let config = exec::Config { nanny, ..self.shared.config.exec.clone() };
            let pool = exec::Pool::start(config, self.shared.store.arena().clone(), events)?;
            let end = self.register_and_drive(&pool, outcomes, attempt, waiting.take()).await;
            self.shared.pulse.set_ready(false);
            self.shared.set_pool(None);
            match &end {
                Ok(End::Restart { .. } | End::Lost(_)) => pool.shutdown_worker().await,
                _ => pool.shutdown().await,
            }
            self.nanny_state = pool.nanny();
            self.shared.store.clear();
            // from now on, whoever has our name or address may be ourselves
            attempt = Attempt::Again;
            match end? {
                End::Leave => return Ok(()),
                End::Failed(error) => return Err(error),
                End::Lost(lost) => {
                    warn!(target: WORKER, "{lost}; registering anew");
                    // the scheduler to come has its own
                    self.nanny_state.plugins.clear();
                    if let Some(nanny) = &mut self.nanny {
                        nanny.forget();
                    }
                }
                End::Restart { down, up } => {
                    if let Some(down) = down {
                        // whoever asked may have given up
                        let _ = down.send(());
                    }
                    waiting = up;
                }
            }
            self.shared.renew_identity();
        }
    }

    /// One registration, from looking for the scheduler to its end.
    async fn register_and_drive(
        &mut self,
        pool: &exec::Pool,
        outcomes: mpsc::UnboundedReceiver<exec::Event>,
        attempt: Attempt,
        waiting: Option<oneshot::Sender<()>>,
    ) -> Result<End, Error> {
        self.shared.set_status(Status::Init);
        self.shared.set_pool(Some(pool.clone()));
        pool.set_worker_info(self.info());
        let mut stop = self.stop.clone();
        let mut waiting: Vec<_> = waiting.into_iter().collect();
        let registered = tokio::select! {
            registered = register(&self.shared, pool, self.nanny.as_mut(), attempt) => registered?,
            () = turn(&self.shared.pulse) => return Ok(End::Leave),
            () = told(&mut stop) => return Ok(End::Leave),
            () = told_to_close(&mut self.commands, &mut waiting) => return Ok(End::Leave),
        };
        let Some(session) = registered else {
            return Ok(End::Restart { down: None, up: waiting.pop() });
        };
        self.shared.pulse.set_ready(true);
        for waiting in waiting {
            // whoever asked may have given up
            let _ = waiting.send(());
        }
        let (jobs, reports) = mpsc::unbounded_channel();
        let driver = Driver::new(self.shared.clone(), pool.clone(), session, jobs);
        let inputs = Inputs { outcomes, reports, commands: &mut self.commands, stop: self.stop.clone() };
        Ok(driver.run(inputs).await)
    }

    fn info(&self) -> WorkerInfo {
        let identity = self.shared.identity();
        let scheduler = self.shared.scheduler.address();
        WorkerInfo {
            address: identity.address.to_string(),
            name: Value::from(&identity.name),
            id: identity.server_id.to_string(),
            nthreads: identity.nthreads,
            local_directory: identity.local_directory.display().to_string(),
            memory_limit: identity.memory_limit,
            scheduler_address: scheduler.map(|address| address.to_string()).unwrap_or_default(),
            nanny_address: self.nanny.as_ref().map(|nanny| nanny.address.to_string()).unwrap_or_default(),
            nanny_id: self.nanny.as_ref().map(|nanny| nanny.id.to_string()).unwrap_or_default(),
        }
    }
}

/// Stock nannies listen on the one address that reaches the scheduler, unless they are told another.
fn nanny_listen(listen: &Listen, own: IpAddr) -> Listen {
    let host = listen.host.clone().unwrap_or_else(|| own.to_string());
    Listen { host: Some(host), ports: listen.ports.clone() }
}

fn facts(name: &Name, address: &Address) -> telemetry::http::Facts {
    let mut facts = telemetry::http::Facts::new();
    facts.insert("name".into(), name.to_string().into());
    facts.insert("address".into(), address.as_str().into());
    facts.insert("version".into(), env!("CARGO_PKG_VERSION").into());
    facts
}

fn server(shared: &Arc<Shared>, address: Address) -> Peer<WorkerBackend> {
    Peer {
        backend: WorkerBackend(shared.clone()),
        store: shared.store.clone(),
        transfers: shared.transfers.clone(),
        pool: shared.peers.clone(),
        address,
        config: shared.config.peer.clone(),
    }
}

/// Waits for the order to leave, while there is no driver to take it. Those who want the worker to be up wait with it.
async fn told_to_close(
    commands: &mut mpsc::UnboundedReceiver<Command>,
    waiting: &mut Vec<oneshot::Sender<()>>,
) {
    while let Some(command) = commands.recv().await {
        match command {
            Command::Close { .. } | Command::CloseGracefully { .. } => return,
            Command::Instantiate { done } | Command::Restart { done, .. } => waiting.push(done),
            // there is nothing to kill
            Command::Kill { done, .. } => _ = done.send(()),
            // those who ask about tasks and data see that there is no worker
            _ => {}
        }
    }
    std::future::pending().await
}

/// Registers nanny and worker, in the order of a stock nanny, and sets up the plugins that the scheduler has for them.
/// `None` when nanny plugins want another interpreter first.
async fn register(
    shared: &Shared,
    pool: &exec::Pool,
    nanny: Option<&mut Role>,
    attempt: Attempt,
) -> Result<Option<Session>, Error> {
    let mut announced = None;
    if let Some(nanny) = nanny {
        let before = pool.nanny();
        nanny.announce(shared, pool).await?;
        if !pool.nanny().starts_alike(&before) {
            return Ok(None);
        }
        announced = nanny.take_announcement();
    }
    let identity = shared.identity();
    let mut session = shared.scheduler.register(&identity, &at_rest(shared), attempt).await?;
    plugins::set_up(pool, session.take_plugins()).await;
    if let Some(announced) = announced {
        plugins::up(announced).await;
    }
    Ok(Some(session))
}

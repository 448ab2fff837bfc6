//! The HTTP endpoints, on a thread and runtime of their own: they answer while the driver is stuck, which is when they are asked.
//!
//! | path | answer |
//! |---|---|
//! | `/health` | `ok`, or 503 with the reason when the driver has stopped turning |
//! | `/ready` | `ok`, or 503 while the worker is not registered |
//! | `/metrics` | Prometheus text |
//! | `/info` | JSON about this worker |
//! | `/`, `/status` | redirect to `/info`: the scheduler's pages link a worker's `/status` |
//! | `/sitemap.json` | the paths, as any Dask server lists them |
//!
//! Nothing here can change the worker.

use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::thread::JoinHandle;

use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Json, Redirect, Response};
use axum::{Router, routing::get};
use serde_json::{Value, json};
use tokio::sync::oneshot;

use super::metrics::Exposition;
use super::{Error, Metrics, Pulse};

/// Settings of the endpoints.
#[derive(Clone, Debug)]
pub struct Config {
    /// Address to listen on; port 0 lets the system choose.
    pub address: SocketAddr,
    /// Path in front of all routes (`--dashboard-prefix`), empty for none.
    pub prefix: String,
}

/// What `/info` tells beyond health: fixed facts, such as name, address, version, sandbox level.
pub type Facts = serde_json::Map<String, Value>;

#[derive(Clone)]
struct Shared {
    exposition: Exposition,
    pulse: Pulse,
    facts: Arc<Facts>,
    prefix: Arc<str>,
}

/// The running endpoints; dropping it stops them.
#[derive(Debug)]
pub struct Server {
    address: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Binds, and serves on a thread of its own.
    ///
    /// A port that is taken is replaced by one the system chooses, with a warning, as `distributed/node.py` does.
    ///
    /// # Errors
    /// [`Error::Bind`] when no port of that address can be had, [`Error::Thread`] when the thread cannot start.
    pub fn start(config: &Config, metrics: &Metrics, pulse: Pulse, facts: Facts) -> Result<Self, Error> {
        let listener = bind(config.address)?;
        let address = listener
            .local_addr()
            .and_then(|address| listener.set_nonblocking(true).map(|()| address))
            .map_err(|source| Error::Bind { address: config.address, source })?;
        let prefix = config.prefix.trim_matches('/');
        let prefix: Arc<str> = if prefix.is_empty() { "".into() } else { format!("/{prefix}").into() };
        let exposition = Exposition::new(metrics, &pulse);
        let shared = Shared { exposition, pulse, facts: Arc::new(facts), prefix };
        let (stop, stopped) = oneshot::channel();
        let thread = std::thread::Builder::new()
            .name("http".into())
            .spawn(move || run(listener, shared, stopped))
            .map_err(|source| Error::Thread { source })?;
        Ok(Server { address, stop: Some(stop), thread: Some(thread) })
    }

    /// Where it listens; its port is the `dashboard` service that the scheduler is told.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // the receiver is gone only if the thread has already ended
        let _ = self.stop.take().map(|stop| stop.send(()));
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn bind(wanted: SocketAddr) -> Result<TcpListener, Error> {
    let listener = TcpListener::bind(wanted).or_else(|error| {
        if wanted.port() == 0 || error.kind() != std::io::ErrorKind::AddrInUse {
            return Err(error);
        }
        let other = TcpListener::bind(SocketAddr::new(wanted.ip(), 0))?;
        tracing::warn!(
            "Port {} is already in use. Perhaps you already have a cluster running? \
             Hosting the HTTP server on port {} instead",
            wanted.port(),
            other.local_addr()?.port()
        );
        Ok(other)
    });
    listener.map_err(|source| Error::Bind { address: wanted, source })
}

fn run(listener: TcpListener, shared: Shared, stopped: oneshot::Receiver<()>) {
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_io().build() {
        Ok(runtime) => runtime,
        Err(error) => return tracing::error!(%error, "the HTTP endpoints have no runtime"),
    };
    runtime.block_on(async move {
        let serve = async {
            let listener = tokio::net::TcpListener::from_std(listener)?;
            axum::serve(listener, router(shared)).await
        };
        tokio::select! {
            result = serve => if let Err(error) = result {
                tracing::error!(%error, "the HTTP endpoints ended");
            },
            // either told to stop, or the owner is gone
            _ = stopped => {}
        }
    });
}

fn router(shared: Shared) -> Router {
    let routes = Router::new()
        .route("/health", get(health))
        .route("/ready", get(ready))
        .route("/metrics", get(metrics))
        .route("/info", get(info))
        .route("/status", get(to_info))
        .route("/sitemap.json", get(sitemap));
    let prefix = shared.prefix.clone();
    let root = format!("{prefix}/");
    match prefix.is_empty() {
        true => routes.route("/", get(to_info)),
        false => Router::new().nest(&prefix, routes).route(&root, get(to_info)),
    }
    .with_state(shared)
}

/// 200 with `ok`, or 503 with a reason.
fn verdict(fault: Option<String>) -> Response {
    match fault {
        None => (StatusCode::OK, "ok").into_response(),
        Some(reason) => (StatusCode::SERVICE_UNAVAILABLE, reason).into_response(),
    }
}

async fn health(State(shared): State<Shared>) -> Response {
    let age = shared.pulse.age().as_secs_f64();
    verdict(shared.pulse.stalled().then(|| format!("the driver has not turned for {age:.1} s")))
}

async fn ready(State(shared): State<Shared>) -> Response {
    verdict((!shared.pulse.ready()).then(|| "not registered with a scheduler".to_owned()))
}

async fn metrics(State(shared): State<Shared>) -> Response {
    match shared.exposition.render() {
        Ok(text) => ([(header::CONTENT_TYPE, Exposition::MEDIA_TYPE)], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

async fn info(State(shared): State<Shared>) -> Json<Value> {
    let mut facts = Facts::clone(&shared.facts);
    let age = shared.pulse.age().as_secs_f64();
    facts.insert("ready".into(), shared.pulse.ready().into());
    facts.insert("last_tick_age_seconds".into(), age.into());
    Json(Value::Object(facts))
}

async fn to_info(State(shared): State<Shared>) -> Redirect {
    Redirect::temporary(&format!("{}/info", shared.prefix))
}

async fn sitemap(State(shared): State<Shared>) -> Json<Value> {
    let paths = ["/health", "/info", "/metrics", "/ready", "/sitemap.json", "/status"];
    Json(json!({ "paths": paths.map(|path| format!("{}{path}", shared.prefix)) }))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::io::{Read, Write};
    use std::net::TcpStream;
    use std::time::Duration;

    use super::*;

    fn start(prefix: &str, pulse: &Pulse) -> Server {
        let config = Config { address: ([127, 0, 0, 1], 0).into(), prefix: prefix.into() };
        let facts = Facts::from_iter([("name".to_owned(), "w1".into())]);
        Server::start(&config, &Metrics::default(), pulse.clone(), facts).unwrap()
    }

    fn fetch(server: &Server, path: &str) -> String {
        let mut stream = TcpStream::connect(server.address()).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        write!(stream, "GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    }

    #[test]
    fn health_readiness_metrics_info() {
        let pulse = Pulse::new(Duration::from_secs(60));
        let server = start("", &pulse);
        let health = fetch(&server, "/health");
        assert!(health.starts_with("HTTP/1.1 200") && health.ends_with("\r\n\r\nok"), "{health}");
        assert!(fetch(&server, "/ready").starts_with("HTTP/1.1 503"));
        pulse.set_ready(true);
        assert!(fetch(&server, "/ready").starts_with("HTTP/1.1 200"));
        let metrics = fetch(&server, "/metrics");
        assert!(
            metrics.contains("text/plain; version=0.0.4") && metrics.contains("\ndask_worker_threads 0\n")
        );
        let info = fetch(&server, "/info");
        assert!(info.contains("\"name\":\"w1\"") && info.contains("\"ready\":true"), "{info}");
        assert!(fetch(&server, "/").contains("location: /info"));
        assert!(fetch(&server, "/nothing").starts_with("HTTP/1.1 404"));
    }

    #[test]
    fn a_prefix_and_a_port_that_is_taken() {
        let pulse = Pulse::new(Duration::from_secs(60));
        let first = start("/a/b/", &pulse);
        assert!(fetch(&first, "/a/b/health").starts_with("HTTP/1.1 200"));
        assert!(fetch(&first, "/a/b/status").contains("location: /a/b/info"));
        assert!(fetch(&first, "/a/b/").contains("location: /a/b/info"));
        let config = Config { address: first.address(), prefix: String::new() };
        let second = Server::start(&config, &Metrics::default(), pulse, Facts::new()).unwrap();
        assert_ne!(second.address().port(), first.address().port());
    }

    #[test]
    fn dropping_stops_and_frees_the_port() {
        let server = start("", &Pulse::new(Duration::from_secs(60)));
        let address = server.address();
        drop(server);
        TcpListener::bind(address).unwrap();
    }

    #[test]
    fn a_driver_that_stands_still_is_reported() {
        let pulse = Pulse::stalled_for_test();
        let server = start("", &pulse);
        let health = fetch(&server, "/health");
        assert!(health.starts_with("HTTP/1.1 503") && health.contains("has not turned for"), "{health}");
    }
}

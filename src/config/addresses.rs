//! Addresses and ports: where the scheduler is, what to listen on, what to tell others, how ports are shared out.
//!
//! Follows `distributed/cli/dask_worker.py` and `distributed/comm/addressing.py`. Nothing is bound here.

use std::collections::BTreeSet;
use std::net::{SocketAddr, ToSocketAddrs};

use crate::proto::Address;
use crate::scheduler::Location;
use crate::telemetry;

use super::Error;
use super::keys::NO_TLS;
use super::sources::{Found, Sources, boolean, ports, text};

/// Where a worker listens, and what it tells others.
#[derive(Debug)]
pub struct Listen {
    /// Host to listen on; `None` for all addresses.
    pub host: Option<String>,
    /// Address to tell.
    pub contact: Option<Address>,
    /// Whether `--listen-address` was given.
    pub listening: bool,
    worker_ports: Option<Vec<u16>>,
    nanny_ports: Option<Vec<u16>>,
}

/// The scheduler's address or the file it is in; the file counts where both are given.
///
/// # Errors
/// Neither is given, the address does not parse, or its scheme is not ours.
pub fn scheduler(sources: &Sources) -> Result<Location, Error> {
    if let Some(path) = sources.read("scheduler-file", text)? {
        return Ok(Location::File(path.into()));
    }
    let found = sources.find("scheduler").ok_or(Error::NoScheduler)?;
    let given = text(&found.node.value).map_err(|reason| found.wrong(reason))?;
    let given = match (given.contains("://"), sources.find("comm.default-scheme")) {
        (false, Some(scheme)) => {
            format!("{}://{given}", text(&scheme.node.value).map_err(|reason| scheme.wrong(reason))?)
        }
        _ => given,
    };
    Ok(Location::Address(address(&given, &found)?))
}

fn address(given: &str, found: &Found) -> Result<Address, Error> {
    let parsed = Address::parse(given).map_err(|error| found.wrong(error.to_string()))?;
    if parsed.scheme() == "tls" {
        return Err(Error::Refused { place: found.place(), why: NO_TLS });
    }
    Ok(parsed)
}

/// Reads everything about listening.
///
/// # Errors
/// Single values that are wrong, and combinations that contradict each other.
pub fn read(sources: &Sources) -> Result<Listen, Error> {
    protocol(sources)?;
    let usage = |message: &str| Err(Error::Combination { message: message.to_owned() });
    let given = |name| sources.find(name).is_some();
    if given("contact-address") && !given("listen-address") {
        return usage("must specify --listen-address when --contact-address is given");
    }
    if given("listen-address") && (given("worker-port") || given("host")) {
        return usage("you cannot specify --listen-address when --worker-port or --host is given");
    }
    if given("interface") && (given("host") || given("listen-address")) {
        return usage("you cannot specify both --interface and --host or --listen-address");
    }
    let mut listen = Listen {
        host: None,
        contact: None,
        listening: false,
        worker_ports: sources.read("worker-port", ports)?,
        nanny_ports: sources.read("nanny-port", ports)?,
    };
    if let Some(found) = sources.find("listen-address") {
        listen.read_listen_address(&found)?;
    } else if let Some(found) = sources.find("host") {
        listen.read_host(&found)?;
    } else if let Some(found) = sources.find("interface") {
        let name = text(&found.node.value).map_err(|reason| found.wrong(reason))?;
        listen.host = Some(interface_address(&name).map_err(|reason| found.wrong(reason))?);
    }
    if let Some(found) = sources.find("contact-address") {
        listen.contact = Some(strict_address(&found)?);
    }
    Ok(listen)
}

fn protocol(sources: &Sources) -> Result<(), Error> {
    let Some(found) = sources.find("protocol") else { return Ok(()) };
    match text(&found.node.value).map_err(|reason| found.wrong(reason))?.trim_end_matches("://") {
        "tcp" => Ok(()),
        "tls" => Err(Error::Refused { place: found.place(), why: NO_TLS }),
        _ => Err(found.wrong("this worker speaks tcp only")),
    }
}

/// An address that must say its scheme, as `get_address_host_port(strict=True)`.
fn strict_address(found: &Found) -> Result<Address, Error> {
    let given = text(&found.node.value).map_err(|reason| found.wrong(reason))?;
    if !given.contains("://") {
        return Err(found.wrong("must include the protocol, like tcp://localhost:8000"));
    }
    address(&given, found)
}

/// Ports of one worker and of its nanny.
pub type Share = (Vec<u16>, Vec<u16>);

impl Listen {
    fn read_listen_address(&mut self, found: &Found) -> Result<(), Error> {
        self.listening = true;
        let given = text(&found.node.value).map_err(|reason| found.wrong(reason))?;
        // without a host it means every address, which is no address to tell anyone
        if let Some(port) = given.strip_prefix("tcp://:") {
            let port = port.parse().map_err(|_| found.wrong("the port is not a number from 0 to 65535"))?;
            self.worker_ports = Some(vec![port]);
            return Ok(());
        }
        let address = strict_address(found)?;
        self.host = Some(address.host().to_owned());
        self.worker_ports = Some(vec![address.port()]);
        let concrete = address.port() != 0 && !matches!(address.host(), "0.0.0.0" | "::");
        self.contact = concrete.then_some(address);
        Ok(())
    }

    /// A host may carry a scheme and a port, as `distributed.comm.addressing.uri_from_host_port` allows.
    fn read_host(&mut self, found: &Found) -> Result<(), Error> {
        let given = text(&found.node.value).map_err(|reason| found.wrong(reason))?;
        let location = match given.split_once("://") {
            Some(("tcp", location)) => location,
            Some(("tls", _)) => return Err(Error::Refused { place: found.place(), why: NO_TLS }),
            Some(_) => return Err(found.wrong("this worker speaks tcp only")),
            None => given.as_str(),
        };
        let (host, port) = split_host(location).map_err(|reason| found.wrong(reason))?;
        self.host = Some(host.to_owned());
        match (port, &self.worker_ports) {
            (None | Some(0), _) => {}
            (Some(port), None) => self.worker_ports = Some(vec![port]),
            (Some(port), Some(given)) if *given == [port] => {}
            (Some(_), Some(_)) => return Err(found.wrong("another port is given with --worker-port")),
        }
        Ok(())
    }

    /// Shares the ports out among workers and nannies, as `dask_worker._apportion_ports`: (worker's, nanny's) for each.
    ///
    /// # Errors
    /// Fewer ports than workers.
    pub fn apportion(&self, workers: usize, nanny: bool) -> Result<Vec<Share>, Error> {
        let any = |ports: &Option<Vec<u16>>| match ports {
            None => vec![0; workers],
            Some(ports) if *ports == [0] => vec![0; workers],
            Some(ports) => ports.clone(),
        };
        let (worker_ports, nanny_ports) = (any(&self.worker_ports), any(&self.nanny_ports));
        let (mut worker_ports, mut nanny_ports) = (worker_ports.into_iter(), nanny_ports.into_iter());
        let mut seen = BTreeSet::new();
        let mut shares = vec![(BTreeSet::new(), BTreeSet::new()); workers];
        let (mut more_worker, mut more_nanny, mut i) = (true, true, 0);
        while more_worker || more_nanny {
            let (worker, nanny) = &mut shares[i % workers];
            let mut fresh = |port: &u16| *port == 0 || seen.insert(*port);
            let port = worker_ports.by_ref().find(&mut fresh);
            more_worker = port.is_some();
            worker.extend(port);
            let port = nanny_ports.by_ref().find(&mut fresh);
            more_nanny = port.is_some();
            nanny.extend(port);
            i += 1;
        }
        if shares.iter().any(|(worker, of_nanny)| worker.is_empty() || (nanny && of_nanny.is_empty())) {
            let message = format!("not enough ports in --worker-port and --nanny-port for {workers} workers");
            return Err(Error::Combination { message });
        }
        Ok(shares.into_iter().map(|(w, n)| (w.into_iter().collect(), n.into_iter().collect())).collect())
    }
}

/// `host`, `host:port`, `[v6]` or `[v6]:port`, as `distributed.comm.addressing.parse_host_port`.
fn split_host(location: &str) -> Result<(&str, Option<u16>), String> {
    let (host, rest) = match location.strip_prefix('[') {
        Some(inside) => inside.split_once(']').ok_or("an IPv6 address needs brackets like [::1]")?,
        None => match location.find(':') {
            Some(at) if location[at + 1..].contains(':') => {
                return Err("an IPv6 address needs brackets like [::1]".into());
            }
            Some(at) => location.split_at(at),
            None => (location, ""),
        },
    };
    let port = match rest.strip_prefix(':') {
        Some(port) => Some(port.parse().map_err(|_| format!("'{port}' is not a port from 0 to 65535"))?),
        None if rest.is_empty() => None,
        None => return Err(format!("'{rest}' follows the address")),
    };
    Ok((host, port))
}

/// The first IPv4 address of a network interface, as `distributed.utils.get_ip_interface`.
fn interface_address(name: &str) -> Result<String, String> {
    let all =
        nix::ifaddrs::getifaddrs().map_err(|error| format!("cannot list network interfaces: {error}"))?;
    let (mut names, mut address) = (BTreeSet::new(), None);
    for entry in all {
        let v4 = entry.address.as_ref().and_then(|a| a.as_sockaddr_in()).map(|a| a.ip());
        if entry.interface_name == name && address.is_none() {
            address = v4;
        }
        names.insert(entry.interface_name);
    }
    match address {
        Some(address) => Ok(address.to_string()),
        None if names.contains(name) => Err("this interface has no IPv4 address".into()),
        None => {
            let names: Vec<String> = names.into_iter().collect();
            Err(format!("there is no such network interface; there are {}", names.join(", ")))
        }
    }
}

/// The HTTP endpoints' address: `:0` by default, `8787`, `:8787`, `host:8787`, as `clean_dashboard_address`.
///
/// # Errors
/// An address that does not parse or resolve.
pub fn dashboard(sources: &Sources) -> Result<Option<telemetry::http::Config>, Error> {
    if !sources.read("dashboard", boolean)?.unwrap_or(true) {
        return Ok(None);
    }
    let prefix = sources.read("dashboard-prefix", text)?.unwrap_or_default();
    let address = sources.read("dashboard-address", |value| dashboard_address(&text(value)?))?;
    let address = address.unwrap_or(SocketAddr::from(([0, 0, 0, 0], 0)));
    Ok(Some(telemetry::http::Config { address, prefix }))
}

fn dashboard_address(given: &str) -> Result<SocketAddr, String> {
    if given.contains(',') {
        return Err("this worker serves HTTP at one address".into());
    }
    let (host, port) = match given.parse() {
        Ok(port) => ("", Some(port)),
        Err(_) => split_host(given)?,
    };
    let host = if host.is_empty() { "0.0.0.0" } else { host };
    let resolved = (host, port.unwrap_or(0)).to_socket_addrs().map_err(|error| error.to_string())?.next();
    resolved.ok_or_else(|| "the host has no address".into())
}

/// [`Listen::apportion`] of texts, for the comparison with Dask's own.
#[cfg(test)]
pub fn test_apportion(
    worker: Option<&str>,
    nanny: Option<&str>,
    workers: usize,
) -> Result<Vec<Share>, String> {
    let ports = |text: Option<&str>| text.map(super::parse::parse_ports).transpose();
    let (worker_ports, nanny_ports) = (ports(worker)?, ports(nanny)?);
    let listen = Listen { host: None, contact: None, listening: false, worker_ports, nanny_ports };
    listen.apportion(workers, true).map_err(|error| error.to_string())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn dashboard_addresses() {
        let show = |text| dashboard_address(text).unwrap().to_string();
        assert_eq!(show(":0"), "0.0.0.0:0");
        assert_eq!(show("8787"), "0.0.0.0:8787");
        assert_eq!(show("127.0.0.1:8787"), "127.0.0.1:8787");
        assert_eq!(show("[::1]:8787"), "[::1]:8787");
        assert!(dashboard_address(":8787,:8788").is_err());
        assert!(dashboard_address("::1").is_err());
    }

    #[test]
    fn interfaces_by_name() {
        assert_eq!(interface_address("lo"), Ok("127.0.0.1".into()));
        assert!(interface_address("nope0").unwrap_err().contains("lo"));
    }
}

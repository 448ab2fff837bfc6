//! A lightweight Dask worker: one daemon for each machine, tasks in Python subprocesses.
//!
//! Rooms, lowest first; each may use only what stands above it here. `tests/layering.rs` holds the code to this table.
//!
//! | level | room | holds | may use |
//! |---|---|---|---|
//! | 0 | `proto` | typed messages, keys, addresses, priorities | - |
//! | 0 | `sys` | the only `unsafe`: memfd, mmap, pidfd, fd passing | - |
//! | 0 | `telemetry` | log records, metrics, the driver's pulse, HTTP endpoints | - |
//! | 1 | `state` | the worker state machine; no IO, no clock | proto |
//! | 1 | `store` | results by key, in memory and on disk, accounting | proto, sys, telemetry |
//! | 1 | `wire` | framing, msgpack dialect, compression, handshake; no sockets | proto |
//! | 1 | `scratch` | work directories on disk: locks, clean-up | - |
//! | 1 | `systemd` | what a service manager is told: ready, status, alive | - |
//! | 1 | `sandbox` | the stub that Python processes are executed through | sys |
//! | 2 | `exec` | zygote, runners, service process, and the messages to them | proto, wire, sys, sandbox, store, telemetry |
//! | 2 | `net` | dialling, listening, connections, pool, batched stream | proto, wire, telemetry |
//! | 3 | `scheduler` | registration, stream, heartbeats, versions, system monitor | proto, net, telemetry |
//! | 3 | `peer` | data server, fetching, worker and nanny ops | proto, wire, net, store, telemetry |
//! | 4 | `agent` | the driver: events to the state machine, instructions to side effects | everything above |
//! | 5 | `config` | options, files, environment, interpreter, machine; resolved settings | everything above |
//! | 6 | `cli`, `main` | command line, exit codes, boot order | everything above |

pub mod agent;
pub mod cli;
pub mod config;
pub mod exec;
pub mod net;
pub mod peer;
pub mod proto;
pub mod sandbox;
pub mod scheduler;
pub mod scratch;
pub mod state;
pub mod store;
pub mod sys;
pub mod systemd;
pub mod telemetry;
pub mod wire;

//! The pool against a real interpreter: jobs, deaths, recalls, the service process.
#![allow(clippy::unwrap_used, clippy::print_stderr, clippy::print_stdout)]

mod actors;
mod brief;
mod cost;
mod deaths;
mod fixture;
mod forge;
mod live;
mod processes;
mod recall;
mod service;
mod tasks;

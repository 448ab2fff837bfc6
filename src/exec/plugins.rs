//! Plugins at the daemon: which there are, so that processes to come set them up, and what the service says of them.
//!
//! A plugin is a pickle here. It is set up in the service process first, which reports it; then in every runner.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use bytes::Bytes;

use super::Event;
use super::ipc::{self, FromChild, Outgoing, Target, ToChild};
use super::pool::{Shared, State};
use crate::proto::Value;
use crate::telemetry;

/// Plugins by name, oldest first.
pub(super) type Plugins = Vec<(Value, Bytes)>;

/// What nanny plugins are there, and what they made of the processes to come. Outlives a pool: a nanny outlives its
/// workers.
#[derive(Clone, Debug, Default)]
pub struct NannyState {
    /// Plugins by name, oldest first.
    pub plugins: Vec<(Value, Bytes)>,
    /// Variables set, or unset.
    pub variables: Vec<(String, Option<String>)>,
    /// Entries of `sys.path`, behind the worker's directory.
    pub path: Vec<String>,
}

impl NannyState {
    /// Whether an interpreter that was started in the other state is as one started now.
    pub fn starts_alike(&self, other: &NannyState) -> bool {
        self.variables == other.variables && self.path == other.path
    }

    fn take_in(&mut self, variables: Vec<(String, Option<String>)>, path: Vec<String>) {
        for (name, value) in variables {
            match self.variables.iter_mut().find(|(known, _)| *known == name) {
                Some(known) => known.1 = value,
                None => self.variables.push((name, value)),
            }
        }
        for entry in path {
            if !self.path.contains(&entry) {
                self.path.push(entry);
            }
        }
    }
}

/// Takes a plugin in; one of the same name goes, as it does in Dask.
fn put(plugins: &mut Plugins, name: Value, pickle: Bytes) {
    plugins.retain(|(known, _)| *known != name);
    plugins.push((name, pickle));
}

impl State {
    /// Whether a plugin may have something to do without being asked.
    pub(super) fn has_plugins_to_run(&self) -> bool {
        !self.nanny.plugins.is_empty() || self.plugins.iter().any(|(name, _)| !self.lazy.contains(name))
    }

    fn plugins_of(&mut self, target: Target) -> &mut Plugins {
        match target {
            Target::Worker => &mut self.plugins,
            Target::Nanny => &mut self.nanny.plugins,
        }
    }

    /// Tells all runners.
    fn tell_runners(&self, message: &ToChild<'_>) {
        for runner in self.runners.values() {
            match Outgoing::new(message, Vec::new()) {
                Ok(message) => runner.data.send(message),
                Err(error) => tracing::warn!(%error, "a runner could not be told about a plugin"),
            }
        }
    }

    fn add_plugin(&mut self, target: Target, name: Value, pickle: Bytes) {
        if target == Target::Worker {
            let plugins = [(name.clone(), pickle.clone())];
            self.tell_runners(&ToChild::Plugins { target, plugins: &plugins });
        }
        self.lazy.retain(|lazy| *lazy != name);
        put(self.plugins_of(target), name, pickle);
    }

    /// A plugin that need not be set up before somebody uses it: where there is no service yet, the next one does it.
    pub(super) fn add_plugin_lazily(&mut self, name: Value, pickle: Bytes) {
        let plugins = [(name.clone(), pickle.clone())];
        self.service.send(&ToChild::Plugins { target: Target::Worker, plugins: &plugins });
        self.add_plugin(Target::Worker, name.clone(), pickle);
        self.lazy.push(name);
    }

    fn remove_plugin(&mut self, target: Target, name: &Value) {
        if target == Target::Worker {
            self.tell_runners(&ToChild::Unplug { name });
        }
        self.plugins_of(target).retain(|(known, _)| known != name);
    }
}

impl Shared {
    /// What the service says of plugins.
    pub(super) fn plugins_said(&self, message: FromChild) -> Result<(), ipc::Error> {
        let mut state = self.state();
        match message {
            FromChild::PluginAdded { target, name, pickle } => state.add_plugin(target, name, pickle),
            FromChild::PluginRemoved { target, name } => state.remove_plugin(target, &name),
            FromChild::Environment { variables, path } => state.nanny.take_in(variables, path),
            FromChild::Holds { transitions, state: held } => {
                state.service.holds(held);
                if state.watching != transitions {
                    state.watching = transitions;
                    self.emit(Event::WatchTransitions(transitions));
                }
            }
            _ => return Err(ipc::Error::Form { tag: None }),
        }
        Ok(())
    }

    /// Passes a runner's call on to the service, and its answer back to the runner's control thread.
    pub(super) fn call(self: &Arc<Self>, runner: u64, request: u64, body: Bytes, fds: Vec<OwnedFd>) {
        let shared = self.clone();
        tokio::spawn(async move {
            let (result, fds) = match shared.ask_call(&body, fds).await {
                Ok((body, fds)) => (Ok(body), fds),
                Err(error) => (Err(telemetry::chain(&error)), Vec::new()),
            };
            let result = result.as_ref().map(|body| &body[..]).map_err(String::as_str);
            match Outgoing::new(&ToChild::Return { request, result }, fds) {
                Ok(message) => {
                    // a runner that is gone waits for nothing
                    if let Some(runner) = shared.state().runners.get(&runner) {
                        runner.control.send(message);
                    }
                }
                Err(error) => tracing::error!(%error, "a call's answer could not be written"),
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_nannys_state_grows() {
        let mut state = NannyState::default();
        let before = state.clone();
        let some = |text: &str| Some(text.to_owned());
        state.take_in(vec![("A".into(), some("1")), ("B".into(), some("2"))], vec!["/x".into()]);
        assert!(!state.starts_alike(&before));
        let before = state.clone();
        state.take_in(vec![("A".into(), some("1"))], vec!["/x".into()]);
        assert!(state.starts_alike(&before));
        state.take_in(vec![("B".into(), None)], Vec::new());
        assert_eq!(state.variables, [("A".into(), some("1")), ("B".into(), None)]);
    }

    #[test]
    fn a_plugin_replaces_that_of_its_name() {
        let mut plugins = Plugins::new();
        for (name, pickle) in [("a", "1"), ("b", "2"), ("a", "3")] {
            put(&mut plugins, name.into(), pickle.into());
        }
        let names: Vec<_> = plugins.iter().map(|(name, pickle)| (name.as_str(), &pickle[..])).collect();
        assert_eq!(names, [(Some("b"), &b"2"[..]), (Some("a"), &b"3"[..])]);
    }
}

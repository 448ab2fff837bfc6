//! The messages about plugins and calls of the service process: how they lie on the socket.
//!
//! What they mean is with [`ToChild`] and [`FromChild`].

use super::{Error, FromChild, Items, Target, ToChild, Writer};

impl Writer {
    /// What is about plugins and calls.
    pub(super) fn plugin_message(&mut self, message: &ToChild<'_>) -> Result<(), Error> {
        match message {
            ToChild::Plugins { target, plugins } => {
                self.head(3, 15);
                self.uint(*target as u64);
                self.array(plugins.len());
                for (name, pickle) in *plugins {
                    self.array(2);
                    self.value(name)?;
                    self.bytes(pickle)?;
                }
            }
            ToChild::Unplug { name } => {
                self.head(2, 16);
                self.value(name)?;
            }
            ToChild::Leave { nanny } => {
                self.head(2, 17);
                self.value(&(*nanny).into())?;
            }
            ToChild::Call { request, body } => {
                self.head(3, 34);
                self.uint(*request);
                self.bytes(body)?;
            }
            ToChild::Return { request, result } => {
                self.head(3, 35);
                self.uint(*request);
                match result {
                    Ok(body) => self.bytes(body)?,
                    Err(text) => self.value(&(*text).into())?,
                }
            }
            ToChild::Stream { frames } => {
                self.head(2, 36);
                self.array(frames.len());
                frames.iter().try_for_each(|frame| self.heap(frame))?;
            }
            ToChild::Transitions { transitions } => {
                self.head(2, 37);
                self.value(transitions)?;
            }
            ToChild::Beat { request } => {
                self.head(2, 38);
                self.uint(*request);
            }
            // `message` writes these
            ToChild::Fork { .. }
            | ToChild::Configure(_)
            | ToChild::Run { .. }
            | ToChild::Exit { .. }
            | ToChild::Keep { .. }
            | ToChild::Publish { .. }
            | ToChild::Forget { .. }
            | ToChild::Stacks { .. }
            | ToChild::Interrupt { .. }
            | ToChild::HandOver
            | ToChild::Request { .. }
            | ToChild::Describe { .. } => return Err(Error::Form { tag: None }),
        }
        Ok(())
    }
}

impl Items {
    pub(super) fn plugin_message(&mut self, tag: i64) -> Option<FromChild> {
        Some(match tag {
            27 => {
                FromChild::PluginAdded { target: self.target()?, name: self.0.next()?, pickle: self.bytes()? }
            }
            28 => FromChild::PluginRemoved { target: self.target()?, name: self.0.next()? },
            29 => FromChild::Holds { transitions: self.flag()?, state: self.flag()? },
            34 => FromChild::Call { request: self.uint()?, body: self.bytes()? },
            35 => FromChild::Returned { request: self.uint()?, body: self.bytes()? },
            39 => FromChild::Environment {
                variables: self.list()?.all(|pair| Some((pair.text()?, pair.maybe_text()?)))?,
                path: self.list()?.each(|entry| entry.as_str().map(str::to_owned))?,
            },
            _ => return None,
        })
    }

    fn flag(&mut self) -> Option<bool> {
        self.0.next()?.as_bool()
    }

    fn target(&mut self) -> Option<Target> {
        match self.int()? {
            0 => Some(Target::Worker),
            1 => Some(Target::Nanny),
            _ => None,
        }
    }
}

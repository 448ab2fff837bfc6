//! What runners report about tasks.

use bytes::Bytes;

use super::{Items, RawObject};

/// Facts about a finished task.
#[derive(Clone, Debug, PartialEq)]
pub(in crate::exec) struct Done {
    pub(in crate::exec) nbytes: u64,
    pub(in crate::exec) type_pickled: Bytes,
    pub(in crate::exec) typename: String,
    pub(in crate::exec) start: f64,
    pub(in crate::exec) stop: f64,
    pub(in crate::exec) thread: i64,
    pub(in crate::exec) cpu: f64,
}

/// A failure as it came.
#[derive(Debug, PartialEq)]
pub(in crate::exec) struct RawFailure {
    pub(in crate::exec) exception: RawObject,
    pub(in crate::exec) traceback: Option<RawObject>,
    pub(in crate::exec) task_text: String,
    pub(in crate::exec) exception_text: String,
    pub(in crate::exec) traceback_text: String,
    pub(in crate::exec) start: Option<f64>,
    pub(in crate::exec) stop: Option<f64>,
    pub(in crate::exec) thread: i64,
}

impl Items {
    pub(super) fn done(&mut self) -> Option<Done> {
        Some(Done {
            nbytes: self.uint()?,
            type_pickled: self.bytes()?,
            typename: self.text()?,
            start: self.float()?,
            stop: self.float()?,
            thread: self.int()?,
            cpu: self.float()?,
        })
    }

    pub(super) fn failure(&mut self) -> Option<RawFailure> {
        Some(RawFailure {
            exception: self.list()?.object()?,
            traceback: self.maybe_object()?,
            task_text: self.text()?,
            exception_text: self.text()?,
            traceback_text: self.text()?,
            start: self.maybe_float()?,
            stop: self.maybe_float()?,
            thread: self.int()?,
        })
    }
}

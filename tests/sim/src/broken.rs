//! An oracle that broke, in a simulated run or in an exploration.

use std::{
    fmt,
    panic::{AssertUnwindSafe, catch_unwind},
};

/// An oracle that broke.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Broken {
    /// Which.
    pub oracle: &'static str,
    /// What it saw.
    pub text: String,
}

impl Broken {
    pub(crate) fn new(oracle: &'static str, text: impl Into<String>) -> Self {
        Self { oracle, text: text.into() }
    }
}

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.oracle, self.text)
    }
}

/// A panic of the core breaks this oracle.
pub(crate) fn caught<T>(oracle: &'static str, work: impl FnOnce() -> T) -> Result<T, Broken> {
    catch_unwind(AssertUnwindSafe(work)).map_err(|panic| {
        let text = panic.downcast_ref::<String>().cloned().or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
        Broken::new(oracle, text.unwrap_or_default())
    })
}

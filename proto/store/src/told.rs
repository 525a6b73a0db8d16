//! How those who wait for changes are told.

use std::time::Duration;

use tokio::sync::watch::Receiver;

use crate::Changes;

/// Changes since it was made, and a look now and then in any case.
pub(crate) struct Told<W> {
    pub(crate) receiver: Receiver<()>,
    pub(crate) relist: Duration,
    /// Keeps the watch, also without the store.
    pub(crate) _watches: W,
}

impl<W: Send> Changes for Told<W> {
    async fn next(&mut self) {
        // Either way it is time to look again.
        drop(tokio::time::timeout(self.relist, self.receiver.changed()).await);
    }
}

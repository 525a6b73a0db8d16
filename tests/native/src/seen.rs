//! What the shell itself saw of the faults: its log says which leg I/O failed or fell short.

use std::sync::{Mutex, OnceLock, PoisonError};

use tracing::{
    Event, Level, Metadata, Subscriber,
    field::{Field, Visit},
};
use tracing_subscriber::{
    EnvFilter, Layer, Registry,
    filter::LevelFilter,
    fmt,
    layer::{Context, SubscriberExt},
    util::SubscriberInitExt,
};

use crate::faulty::Counts;

static SEEN: Mutex<Counts> = Mutex::new(Counts::new());

#[derive(Default)]
struct Fields {
    message: String,
    kind: String,
    errno: Option<i64>,
}

impl Visit for Fields {
    fn record_i64(&mut self, field: &Field, value: i64) {
        if field.name() == "errno" {
            self.errno = Some(value);
        }
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() == "kind" {
            value.clone_into(&mut self.kind);
        }
    }

    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        if field.name() == "message" {
            self.message = format!("{value:?}");
        }
    }
}

struct Counting;

impl<S: Subscriber> Layer<S> for Counting {
    fn enabled(&self, metadata: &Metadata<'_>, _: Context<'_, S>) -> bool {
        metadata.target().starts_with("lockstep_datapath")
    }

    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        if *event.metadata().level() != Level::DEBUG {
            return;
        }
        let mut fields = Fields::default();
        event.record(&mut fields);
        let what = match (fields.message.as_str(), fields.errno) {
            ("a leg's I/O fell short", _) => format!("short {}", fields.kind),
            ("a leg's I/O failed", Some(errno)) => format!("{} {}", name(errno), fields.kind),
            _ => return,
        };
        *SEEN.lock().unwrap_or_else(PoisonError::into_inner).entry(what).or_default() += 1;
    }
}

fn name(errno: i64) -> String {
    let known = [
        (libc::EIO, "EIO"),
        (libc::EINTR, "EINTR"),
        (libc::EAGAIN, "EAGAIN"),
        (libc::ENOMEM, "ENOMEM"),
        (libc::ECANCELED, "ECANCELED"),
        (libc::EBUSY, "EBUSY"),
        (libc::ENOSPC, "ENOSPC"),
    ];
    known.iter().find(|(number, _)| i64::from(*number) == errno).map_or_else(|| errno.to_string(), |(_, name)| (*name).to_owned())
}

/// From now on what the shell sees is counted, and what it warns of is printed.
pub fn watch() {
    static ONCE: OnceLock<()> = OnceLock::new();
    ONCE.get_or_init(|| {
        let wanted = EnvFilter::try_from_env("LOCKSTEP_LOG").unwrap_or_else(|_| EnvFilter::new("warn"));
        let printed = fmt::layer().with_test_writer().with_filter(wanted);
        drop(Registry::default().with(Counting.with_filter(LevelFilter::DEBUG)).with(printed).try_init());
    });
}

/// How often the shell saw what, so far: an error's name and the kind of operation, or "short" and that kind.
pub fn counts() -> Counts {
    SEEN.lock().unwrap_or_else(PoisonError::into_inner).clone()
}

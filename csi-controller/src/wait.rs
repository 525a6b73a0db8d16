//! How long a call waits, and for what.

use std::time::Duration;

use lockstep_store::Changes;
use tokio::{sync::watch, time::Instant};
use tonic::metadata::MetadataMap;

/// The longest that a call waits: also one without a deadline.
const LONGEST: Duration = Duration::from_secs(60);
/// The answer leaves this long before the caller gives up, or a tenth of its time: it says what was waited for.
const MARGIN: Duration = Duration::from_millis(500);

/// When a call must be answered.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Deadline(Instant);

/// Why waiting ended before anything changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Over {
    /// The time is over.
    Deadline,
    /// The process ends.
    Ending,
}

impl Deadline {
    /// The caller's, from the `grpc-timeout` of its metadata.
    pub(crate) fn of(metadata: &MetadataMap) -> Self {
        let given = metadata.get("grpc-timeout").and_then(|value| timeout(value.to_str().ok()?));
        let wait = given.map_or(LONGEST, |given| LONGEST.min(given - MARGIN.min(given / 10)));
        Self(Instant::now() + wait)
    }

    /// Ends when objects may have changed.
    pub(crate) async fn change(self, changes: &mut impl Changes, ending: &watch::Sender<bool>) -> Result<(), Over> {
        let mut ending = ending.subscribe();
        tokio::select! {
            biased;
            _ = ending.wait_for(|ending| *ending) => Err(Over::Ending),
            () = tokio::time::sleep_until(self.0) => Err(Over::Deadline),
            () = changes.next() => Ok(()),
        }
    }
}

/// gRPC's notation: at most eight digits and a unit.
fn timeout(text: &str) -> Option<Duration> {
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    let number: u64 = digits.parse().ok().filter(|_| digits.len() <= 8)?;
    Some(match unit {
        "H" => Duration::from_secs(number * 3600),
        "M" => Duration::from_secs(number * 60),
        "S" => Duration::from_secs(number),
        "m" => Duration::from_millis(number),
        "u" => Duration::from_micros(number),
        "n" => Duration::from_nanos(number),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_timeout_is_read_as_grpc_writes_it() {
        assert_eq!(timeout("3S"), Some(Duration::from_secs(3)));
        assert_eq!(timeout("99999999H"), Some(Duration::from_secs(99_999_999 * 3600)));
        assert_eq!(timeout("250000u"), Some(Duration::from_millis(250)));
        for text in ["", "S", "3", "3x", "-1S", "123456789n", "1☃"] {
            assert_eq!(timeout(text), None, "{text:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_call_waits_for_less_than_its_caller_and_never_for_more_than_a_minute() {
        let wait = |text: Option<&str>| {
            let mut metadata = MetadataMap::new();
            if let Some(text) = text {
                metadata.insert("grpc-timeout", text.parse().unwrap());
            }
            Deadline::of(&metadata).0 - Instant::now()
        };
        assert_eq!(wait(None), LONGEST);
        assert_eq!(wait(Some("nonsense")), LONGEST);
        assert_eq!(wait(Some("10M")), LONGEST);
        assert_eq!(wait(Some("10S")), Duration::from_millis(9500));
        assert_eq!(wait(Some("100m")), Duration::from_millis(90));
    }
}

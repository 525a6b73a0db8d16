//! What a volume's object says of its mirror, and what a person should know.

use std::sync::{Arc, Mutex, PoisonError};

use k8s_openapi::{
    apimachinery::pkg::apis::meta::v1::{Condition, Time},
    jiff::Timestamp,
};
use lockstep_datapath::core::{
    status::{self, LegState, Status, Sync},
    units::{BLOCK_SIZE, LegId},
};
use lockstep_proto::objects::{self, LegStatus, MirrorVolume, MirrorVolumeStatus};
use lockstep_store::{News, Store};
use tracing::{info, warn};

use super::OpenVolume;
use crate::{
    error::Error,
    news::{self, news},
    node::Node,
};

/// How a mirror is, in one word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Health {
    Healthy,
    Resyncing,
    Rebuilding,
    Degraded,
    /// It takes no more writes.
    Failed,
}

impl Health {
    /// Of the condition Ready.
    fn reason(self) -> &'static str {
        match self {
            Self::Healthy => "Healthy",
            Self::Resyncing => "Resyncing",
            Self::Rebuilding => "Rebuilding",
            Self::Degraded => "Degraded",
            Self::Failed => "ReadOnly",
        }
    }
}

fn health(status: &Status) -> Health {
    let all = |wanted: LegState| status.legs.iter().all(|leg| leg.state == wanted);
    match status.sync {
        _ if status.read_only => Health::Failed,
        Sync::Rebuild(_) => Health::Rebuilding,
        Sync::Resync => Health::Resyncing,
        Sync::Idle if all(LegState::In) => Health::Healthy,
        Sync::Idle => Health::Degraded,
    }
}

fn percent(status: &Status) -> Option<u8> {
    let percent = (u128::from(status.sync_done) * 100).checked_div(u128::from(status.sync_total))?;
    u8::try_from(percent.min(100)).ok()
}

/// Sets one condition; its time is when its status changed.
pub(crate) fn set(conditions: &mut Vec<Condition>, kind: &str, status: bool, reason: &str, message: String) {
    let status = if status { "True" } else { "False" };
    let old = conditions.iter_mut().find(|condition| condition.type_ == kind);
    let now = || Time(Timestamp::now());
    match old {
        Some(old) => {
            if old.status != status {
                old.last_transition_time = now();
            }
            (old.status, old.reason, old.message) = (status.into(), reason.into(), message);
        }
        None => conditions.push(Condition {
            type_: kind.into(),
            status: status.into(),
            reason: reason.into(),
            message,
            last_transition_time: now(),
            observed_generation: None,
        }),
    }
}

/// What resync or rebuild had to copy since the volume was staged.
fn copied(status: &Status) -> String {
    let mebibytes = |blocks: u64| (blocks * BLOCK_SIZE).div_ceil(1 << 20);
    match status.copied_blocks {
        0 => "nothing had to be copied since it was staged".into(),
        blocks => format!("{} of {} MiB were copied since it was staged", mebibytes(blocks), mebibytes(status.blocks)),
    }
}

fn set_conditions(conditions: &mut Vec<Condition>, health: Health, status: &Status, lost: &str) {
    let progress = percent(status);
    let copying = matches!(health, Health::Resyncing | Health::Rebuilding);
    let percent = progress.filter(|_| copying).map_or(String::new(), |percent| format!("{percent} % are done. "));
    let (ready, degraded, rebuilding) = match health {
        Health::Healthy => ((true, ""), (false, "BothCopies"), (false, "BothCopies")),
        // Both copies have everything that was acknowledged and flushed; a second failure now would not lose it.
        Health::Resyncing => ((true, "after an unclean stop the copies are being made equal. "), (false, "BothCopies"), (true, "Resync")),
        Health::Rebuilding => ((true, "served from one copy. "), (true, "Rebuilding"), (true, "Rebuild")),
        Health::Degraded => ((true, "served from one copy. "), (true, "CopyLost"), (false, "NoDisk")),
        Health::Failed => {
            ((false, "no copy takes writes any more: unstage the volume, replace the disks. "), (true, "CopyLost"), (false, "ReadOnly"))
        }
    };
    set(conditions, "Ready", ready.0, health.reason(), format!("{}{percent}", ready.1).trim_end().to_owned());
    set(conditions, "Degraded", degraded.0, degraded.1, if degraded.0 { lost.to_owned() } else { String::new() });
    set(conditions, "Rebuilding", rebuilding.0, rebuilding.1, if rebuilding.0 { percent.trim_end().to_owned() } else { copied(status) });
}

/// What the condition Ready gives as its reason; empty: nothing yet.
fn readiness(conditions: &[Condition]) -> String {
    conditions.iter().find(|condition| condition.type_ == "Ready").map_or(String::new(), |condition| condition.reason.clone())
}

/// What is news, if the object gave `before` as its reason until now. `loss`: which copy was lost and why, as this process noticed it.
fn changed(before: &str, health: Health, lost: &str, copied: &str, loss: Option<String>) -> Vec<News> {
    let degraded = matches!(before, "Degraded" | "Rebuilding");
    match health {
        _ if before == health.reason() => Vec::new(),
        Health::Degraded => vec![news(true, "MirrorDegraded", format!("served from one copy: {lost}"))],
        Health::Rebuilding => {
            // There was a disk for it at once.
            let loss = loss.unwrap_or_else(|| "one copy was lost".into());
            let degraded = (!degraded).then(|| news(true, "MirrorDegraded", format!("served from one copy: {loss}")));
            degraded.into_iter().chain([news(false, "RebuildStarted", format!("{lost}; the volume can be used meanwhile"))]).collect()
        }
        Health::Healthy => {
            let rebuilt = (before == "Rebuilding").then(|| news(false, "RebuildCompleted", format!("both copies are current: {copied}")));
            let again = (degraded || before == "ReadOnly").then(|| news(false, "MirrorHealthy", "the volume has two copies again".into()));
            rebuilt.into_iter().chain(again).collect()
        }
        Health::Resyncing => Vec::new(),
        Health::Failed => {
            vec![news(
                true,
                "MirrorFailed",
                "no copy takes writes any more: stop its users, replace the disks, and start them again".into(),
            )]
        }
    }
}

/// What the newest scrub found; before there was one, what an earlier process said of an earlier one stays.
fn set_scrubbed(object: &mut MirrorVolumeStatus, open: &OpenVolume, status: &Status) {
    if let Some((same, reason, message)) = open.scrubbed(&status.scrub) {
        set(&mut object.conditions, "Scrubbed", same, reason, message);
        object.mismatched_blocks = status.scrub.differing();
    }
}

impl<S: Store> Node<S> {
    fn leg_statuses(&self, open: &OpenVolume, status: &Status) -> Vec<LegStatus> {
        let leg = |leg: &status::LegStatus| {
            let state = match leg.state {
                LegState::In => objects::LegState::In,
                LegState::Out => objects::LegState::Out,
                LegState::Recovering => objects::LegState::Recovering,
            };
            LegStatus {
                disk: open.disk_of(leg.id).unwrap_or_default(),
                leg_id: leg.id.to_string(),
                state,
                progress_percent: if leg.state == LegState::Recovering { percent(status) } else { None },
                last_error: if leg.state == LegState::In { None } else { open.error_of(leg.id) },
            }
        };
        status.legs.iter().map(leg).collect()
    }

    /// Which copy is lost, since when is the condition's time, and what happens next.
    fn lost(&self, open: &OpenVolume, status: &Status) -> String {
        let name = |leg: LegId| {
            let Some(disk) = open.disk_of(leg) else { return "a disk that is not there".into() };
            self.disks.get(&disk).map_or(disk, |disk| disk.label)
        };
        let lost = status.legs.iter().find(|leg| leg.state != LegState::In);
        let Some(leg) = lost else { return String::new() };
        let error = open.error_of(leg.id).map_or(String::new(), |error| format!(" ({error})"));
        match leg.state {
            LegState::Recovering => format!("the copy on {} is being filled from the other one", name(leg.id)),
            _ => format!(
                "the copy on {} is lost{error}: it is made again by itself on another disk of the node with room; if there is none, add a disk",
                name(leg.id)
            ),
        }
    }

    /// Writes what changed into the volume's object, and says once what a person should know. The object; none: the mirror does not serve yet.
    pub(super) async fn report(
        self: &Arc<Self>,
        open: &OpenVolume,
        status: &Status,
        before: &mut Option<Health>,
    ) -> Result<Option<MirrorVolume>, Error> {
        if !status.ready {
            return Ok(None);
        }
        let health = health(status);
        if before.replace(health) != Some(health) {
            let lost = self.lost(open, status);
            match health {
                Health::Healthy => info!(reason = "MirrorHealthy", "both copies are current"),
                Health::Resyncing => info!(reason = "ResyncStarted", regions = status.dirty_regions, "the copies are being made equal"),
                Health::Rebuilding => info!(reason = "MirrorRebuilding", "{lost}"),
                Health::Degraded => warn!(reason = "MirrorDegraded", "{lost}"),
                Health::Failed => warn!(reason = "MirrorFailed", "no copy takes writes any more"),
            }
        }
        let device = open.volume.device().display().to_string();
        let said = Mutex::new(None);
        let object = self.patch_known_status(Some(open.latest()), &open.id, &open.uid, |object| {
            if *open.closing.borrow() {
                // What is written at its end is the last word.
                return;
            }
            *said.lock().unwrap_or_else(PoisonError::into_inner) = Some(readiness(&object.conditions));
            object.epoch = status.epoch.0;
            object.device = Some(device.clone());
            open.learn(&object.legs);
            object.legs = self.leg_statuses(open, status);
            set_conditions(&mut object.conditions, health, status, &self.lost(open, status));
            set_scrubbed(object, open, status);
        });
        let object = object.await?;
        open.set_latest(&object);
        // In the object it was so before: what changes is told once, however often this process begins anew.
        if let Some(before) = said.into_inner().unwrap_or_else(PoisonError::into_inner) {
            self.tell_of_volume(&object, self.news(open, status, &before, health, &self.lost(open, status)));
        }
        Ok(Some(object))
    }

    /// What people should hear, now that the object says how the mirror is.
    fn news(&self, open: &OpenVolume, status: &Status, before: &str, health: Health, lost: &str) -> Vec<News> {
        let mut news = changed(before, health, lost, &copied(status), open.loss());
        let leg = status.legs.iter().find(|leg| leg.state != LegState::In);
        let related = leg.and_then(|leg| open.disk_of(leg.id)).map(|name| news::disk(&name));
        news.iter_mut().for_each(|news| news.related.clone_from(&related));
        news
    }

    /// What its conditions are now, whatever its object says.
    pub(crate) fn conditions(&self, open: &OpenVolume, status: &Status) -> Vec<Condition> {
        let mut conditions = Vec::new();
        set_conditions(&mut conditions, health(status), status, &self.lost(open, status));
        conditions
    }

    /// After a clean stop.
    pub(super) async fn report_closed(&self, open: &OpenVolume) {
        let status = *open.volume.status().borrow();
        let health = health(&status);
        let written = self.patch_status(&open.id, &open.uid, |object| {
            object.epoch = status.epoch.0;
            object.device = None;
            open.learn(&object.legs);
            object.legs = self.leg_statuses(open, &status);
            set_conditions(&mut object.conditions, health, &status, &self.lost(open, &status));
            set_scrubbed(object, open, &status);
        });
        if let Err(error) = written.await {
            warn!(%error, "the volume's object still says that it is staged");
        }
    }
}

#[cfg(test)]
mod tests {
    use lockstep_datapath::core::io::Fill;

    use super::*;

    fn condition(conditions: &[Condition], kind: &str) -> (String, String, String) {
        let found = conditions.iter().find(|condition| condition.type_ == kind).unwrap();
        (found.status.clone(), found.reason.clone(), found.message.clone())
    }

    fn status(sync: Sync, done: u64) -> Status {
        let leg = |id| status::LegStatus { id: LegId([id; 16]), state: LegState::In };
        Status {
            blocks: 256 << 8,
            epoch: lockstep_datapath::core::units::Epoch(1),
            legs: [leg(1), leg(2)],
            dirty_regions: 0,
            bad_blocks: 0,
            sync,
            sync_done: done,
            sync_total: 100,
            copied_blocks: 4096,
            scrub: status::Scrub::NEVER,
            write_mostly: None,
            write_behind: false,
            behind: 0,
            pending: 0,
            read_only: false,
            ready: true,
            stopped: false,
        }
    }

    #[test]
    fn what_changes_is_news_and_what_was_said_is_not() {
        use Health::{Degraded, Failed, Healthy, Rebuilding, Resyncing};
        let reasons = |before: &str, health| {
            let news = changed(before, health, "the copy on sdy", "nothing", Some("the copy on sdx is lost (EIO)".into()));
            news.iter().map(|news| news.reason).collect::<Vec<_>>()
        };
        for health in [Healthy, Resyncing, Rebuilding, Degraded, Failed] {
            assert!(reasons(health.reason(), health).is_empty(), "{health:?}");
        }
        assert_eq!(reasons("Healthy", Degraded), ["MirrorDegraded"]);
        assert_eq!(reasons("Degraded", Rebuilding), ["RebuildStarted"]);
        assert_eq!(reasons("Healthy", Rebuilding), ["MirrorDegraded", "RebuildStarted"], "there was a disk for it at once");
        assert_eq!(reasons("Rebuilding", Degraded), ["MirrorDegraded"], "the disk that was filled failed too");
        assert_eq!(reasons("Rebuilding", Healthy), ["RebuildCompleted", "MirrorHealthy"]);
        assert_eq!(reasons("Degraded", Healthy), ["MirrorHealthy"]);
        assert_eq!(reasons("Degraded", Failed), ["MirrorFailed"]);
        for quiet in ["", "Resyncing", "Quarantined"] {
            assert!(reasons(quiet, Healthy).is_empty(), "the first time after {quiet:?}");
        }
        assert!(changed("Healthy", Rebuilding, "", "", Some("sdx (EIO)".into()))[0].message.contains("sdx (EIO)"));
    }

    #[test]
    fn a_condition_keeps_its_time_until_its_status_changes() {
        let mut conditions = Vec::new();
        set_conditions(&mut conditions, Health::Degraded, &status(Sync::Idle, 0), "the copy on sdx is lost");
        let since = conditions.iter().find(|condition| condition.type_ == "Degraded").unwrap().last_transition_time.clone();
        std::thread::sleep(std::time::Duration::from_millis(2));
        set_conditions(
            &mut conditions,
            Health::Rebuilding,
            &status(Sync::Rebuild(Fill::Everything), 40),
            "the copy on sdy is being filled",
        );
        let degraded = conditions.iter().find(|condition| condition.type_ == "Degraded").unwrap();
        assert_eq!(degraded.last_transition_time, since);
        assert_eq!(condition(&conditions, "Degraded").2, "the copy on sdy is being filled");
        assert!(condition(&conditions, "Rebuilding").2.contains("40 %"));
        set_conditions(&mut conditions, Health::Healthy, &status(Sync::Idle, 0), "");
        assert_eq!(condition(&conditions, "Rebuilding").2, "16 of 256 MiB were copied since it was staged");
        assert_eq!(condition(&conditions, "Degraded").0, "False");
        assert_eq!(condition(&conditions, "Ready"), ("True".into(), "Healthy".into(), String::new()));
        assert_ne!(conditions.iter().find(|condition| condition.type_ == "Degraded").unwrap().last_transition_time, since);
    }
}

//! The table.

use std::{collections::BTreeMap, fmt, time::Duration};

use super::{Kind, Phase, Plan};

/// One end of csi-node.
#[derive(Clone, Debug)]
pub struct End {
    /// How.
    pub kind: Kind,
    /// In what, as its log says; several at once, perhaps.
    pub phases: Vec<Phase>,
    /// How long the request took that waited longest of those that were under way then or came next.
    pub stall: Duration,
    /// From the end to that request's answer; none, if the next csi-node ended before it gave one.
    pub answered: Option<Duration>,
}

/// What came of it all.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// The phases that were planned.
    pub phases: Vec<Phase>,
    /// What was planned and did not come about.
    pub missing: Option<(Phase, Kind)>,
    /// Each end.
    pub ends: Vec<End>,
    /// Errors that a user of a volume saw.
    pub errors: Vec<String>,
    /// Bytes that differ between two copies, or were not what was written.
    pub mismatched: u64,
    /// What was fsynced or committed.
    pub commits: u64,
    /// What of that is not on each copy.
    pub lost: u64,
    /// How long csi-node takes to start and say its version.
    pub start: Duration,
}

impl Report {
    /// Whether nobody noticed anything.
    pub fn is_clean(&self) -> bool {
        self.errors.is_empty() && self.mismatched == 0 && self.lost == 0
    }

    /// How many ends hit this phase.
    pub fn hits(&self, phase: Phase) -> usize {
        self.ends.iter().filter(|end| end.phases.contains(&phase)).count()
    }

    /// What the plan wants and did not come about.
    pub(super) fn wanting(&self, plan: &Plan) -> Option<(Phase, Kind)> {
        if plan.least == 0 {
            return None;
        }
        let hits = |phase: Phase, kind: Kind| self.ends.iter().filter(|end| end.kind == kind && end.phases.contains(&phase)).count();
        plan.phases.iter().find_map(|phase| {
            let rarest = plan.kinds.iter().min_by_key(|kind| hits(*phase, **kind))?;
            (self.hits(*phase) < plan.least || hits(*phase, *rarest) == 0).then_some((*phase, *rarest))
        })
    }

    /// What this measures of the ends that it is about, sorted; none under a hung disk.
    fn measured(&self, about: impl Fn(&End) -> bool, measure: fn(&End) -> Option<Duration>) -> Vec<Duration> {
        let mut all: Vec<_> = self.ends.iter().filter(|end| about(end) && !end.phases.contains(&Phase::Hung)).filter_map(measure).collect();
        all.sort();
        all
    }
}

/// The value below which this share of them is, in ms. They are sorted.
fn quantile(sorted: &[Duration], share: f64) -> u128 {
    let place = (sorted.len() as f64 * share).ceil() as usize;
    sorted.get(place.clamp(1, sorted.len().max(1)) - 1).copied().unwrap_or_default().as_millis()
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let row = |f: &mut fmt::Formatter<'_>, name: &str, value: &dyn Fn(Option<Kind>) -> String| {
            write!(f, "{name:<14}")?;
            Kind::ALL.iter().try_for_each(|kind| write!(f, "{:>9}", value(Some(*kind))))?;
            writeln!(f, "{:>9}", value(None))
        };
        row(f, "phase", &|kind| kind.map_or("all".into(), |kind| kind.to_string()))?;
        let mut counts: BTreeMap<(Phase, Kind), usize> = BTreeMap::new();
        for end in &self.ends {
            end.phases.iter().for_each(|phase| *counts.entry((*phase, end.kind)).or_default() += 1);
        }
        for phase in &self.phases {
            let count = |kind: Option<Kind>| match kind {
                Some(kind) => counts.get(&(*phase, kind)).copied().unwrap_or(0),
                None => self.hits(*phase),
            };
            row(f, &phase.to_string(), &|kind| count(kind).to_string())?;
        }
        let of = |kind: Option<Kind>| move |end: &End| kind.is_none_or(|kind| end.kind == kind);
        row(f, "ends", &|kind| self.ends.iter().filter(|end| of(kind)(end)).count().to_string())?;
        for (name, share) in [("stall p50, ms", 0.5), ("stall p99, ms", 0.99), ("stall max, ms", 1.0)] {
            row(f, name, &|kind| quantile(&self.measured(of(kind), |end| Some(end.stall)), share).to_string())?;
        }
        writeln!(
            f,
            "errors seen above {}, mismatched bytes {}, lost commits {} of {}",
            self.errors.len(),
            self.mismatched,
            self.lost,
            self.commits
        )?;
        let answered = |normal: bool| {
            let about = |end: &End| end.kind == Kind::Kill && (!normal || end.phases == [Phase::Normal]);
            let sorted = self.measured(about, |end| end.answered);
            format!("p50 {}, p99 {}, max {} ms", quantile(&sorted, 0.5), quantile(&sorted, 0.99), quantile(&sorted, 1.0))
        };
        if self.ends.iter().any(|end| end.kind == Kind::Kill) {
            writeln!(f, "SIGKILL to the first completed request: {}; in the phase normal: {}", answered(false), answered(true))?;
        }
        writeln!(
            f,
            "csi-node starts in {} ms. Stalls are without those under a hung disk, which last as long as it hangs, up to its deadline",
            self.start.as_millis()
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quantile_is_one_of_the_values_and_the_last_one_the_largest() {
        let values: Vec<_> = (1..=100).map(Duration::from_millis).collect();
        assert_eq!([0.5, 0.99, 1.0].map(|share| quantile(&values, share)), [50, 99, 100]);
        assert_eq!(quantile(&[], 0.5), 0);
    }

    #[test]
    fn a_phase_that_too_few_ends_hit_or_a_kind_did_not_is_missing() {
        let (kinds, phases) = (vec![Kind::Kill, Kind::Term], vec![Phase::Normal, Phase::Mkfs]);
        let plan = Plan { ends: 9, least: 2, phases, kinds, builds: Vec::new(), seed: 1 };
        let mut report = Report::default();
        let mut end = |phases: &[Phase], kind| {
            report.ends.push(End { kind, phases: phases.to_vec(), stall: Duration::ZERO, answered: None });
            report.wanting(&plan)
        };
        assert_eq!(end(&[Phase::Normal], Kind::Kill), Some((Phase::Normal, Kind::Term)));
        assert_eq!(end(&[Phase::Normal, Phase::Mkfs], Kind::Term), Some((Phase::Mkfs, Kind::Kill)));
        assert_eq!(end(&[Phase::Mkfs], Kind::Term), Some((Phase::Mkfs, Kind::Kill)), "twice, but never so");
        assert_eq!(end(&[Phase::Mkfs], Kind::Kill), None);
        assert_eq!(Report::default().wanting(&Plan { least: 0, ..plan }), None);
    }

    #[test]
    fn whoever_noticed_anything_makes_it_unclean() {
        let clean = Report::default();
        assert!(clean.is_clean());
        assert!(!Report { mismatched: 1, ..clean.clone() }.is_clean());
        assert!(!Report { lost: 1, ..clean.clone() }.is_clean());
        assert!(!Report { errors: vec!["fio".into()], ..clean }.is_clean());
    }
}

//! What csi-node was doing when it ended, as its log says.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    io::Read,
    path::Path,
};

use super::Phase;

/// One csi-node's log, read as it grows.
#[derive(Debug)]
pub(super) struct Log {
    file: File,
    /// Of a line that is not whole yet.
    rest: String,
    state: State,
}

#[derive(Debug, Default)]
struct State {
    /// Volumes whose mirror is being assembled: whether somebody uses them already, and the call, if it is one's.
    assembling: BTreeMap<String, (bool, Option<String>)>,
    /// Volumes whose mirror serves.
    serving: BTreeSet<String>,
    /// Legs that failed and are not OUT yet: volume and slot.
    leaving: BTreeSet<(String, String)>,
    /// Bitmap pages on their way: volume, leg, page; whether there are more dirty regions than before.
    pages: BTreeMap<(String, String, String), bool>,
    /// What was written last.
    dirty: BTreeMap<(String, String, String), u64>,
    resyncing: BTreeSet<String>,
    rebuilding: BTreeSet<String>,
    /// Calls: which phase they are in.
    calls: BTreeMap<String, Phase>,
}

/// The value of `name=` in a line: a word, or what is in quotes.
fn field(line: &str, name: &str) -> Option<String> {
    let at = line.find(&format!(" {name}=")).or_else(|| line.find(&format!("{{{name}=")))?;
    let value = &line[at + name.len() + 2..];
    let end = match value.strip_prefix('"') {
        Some(quoted) => return quoted.split('"').next().map(str::to_owned),
        None => value.find([' ', '}']).unwrap_or(value.len()),
    };
    Some(value[..end].to_owned())
}

/// Of a page of the bitmap: its number, and how many regions are dirty.
fn bitmap(line: &str) -> Option<(String, u64)> {
    let rest = line.split("Bitmap { page: ").nth(1)?;
    let (page, rest) = rest.split_once(", dirty: ")?;
    Some((page.to_owned(), rest.split(' ').next()?.parse().ok()?))
}

impl State {
    fn take(&mut self, line: &str) {
        let volume = field(line, "volume").unwrap_or_default();
        let says = |text: &str| line.contains(text);
        if says("handle: assembling volume=") {
            self.assembling.insert(volume, (says("in_use=true"), call(line)));
        } else if says("cannot be assembled yet") {
            self.assembling.remove(&field(line, "uid").unwrap_or_default());
        } else if says("notice=Assembled") {
            self.assembling.remove(&volume);
            self.serving.insert(volume);
        } else if says("notice=LegFailed") {
            self.leaving.insert((volume, slot(line)));
        } else if says("leg is OUT") {
            let slot = slot(line);
            self.rebuilding.remove(&volume);
            self.resyncing.remove(&volume);
            self.pages.retain(|(of, leg, _), _| *of != volume || *leg != slot);
            self.leaving.remove(&(volume, slot));
        } else if says("notice=ResyncStarted") {
            self.resyncing.insert(volume);
        } else if says("notice=ResyncCompleted") {
            self.resyncing.remove(&volume);
        } else if says("notice=RebuildStarted") {
            self.rebuilding.insert(volume);
        } else if says("notice=RebuildCompleted") {
            self.rebuilding.remove(&volume);
        } else if let Some((page, dirty)) = bitmap(line) {
            let key = (volume, slot(line), page);
            if says("metadata is written") {
                let before = self.dirty.insert(key.clone(), dirty).unwrap_or(0);
                if dirty != before {
                    self.pages.insert(key, dirty > before);
                }
            } else {
                self.pages.remove(&key);
            }
        } else if let Some(call) = call(line) {
            if [": done code=", ": refused code=", ": the caller went away "].into_iter().any(says) {
                self.calls.remove(&call);
                self.assembling.retain(|_, (_, of)| of.as_ref() != Some(&call));
            } else if says("unmounting") {
                self.calls.insert(call, Phase::Unstage);
            } else if says("formatting the volume") {
                self.calls.insert(call, Phase::Mkfs);
            } else if says(": assembled") || says("formatted") {
                self.calls.insert(call, Phase::Stage);
            }
        }
    }

    fn phases(&self) -> Vec<Phase> {
        let mut phases = Vec::new();
        for (in_use, _) in self.assembling.values() {
            phases.push(if *in_use { Phase::Recovery } else { Phase::Assembly });
        }
        let states = [
            (!self.leaving.is_empty(), Phase::OutRecord),
            (self.pages.values().any(|more| *more), Phase::BitmapSet),
            (self.pages.values().any(|more| !*more), Phase::BitmapClear),
            (!self.resyncing.is_empty(), Phase::Resync),
            (!self.rebuilding.is_empty(), Phase::Rebuild),
        ];
        phases.extend(states.into_iter().filter_map(|(is, phase)| is.then_some(phase)));
        phases.extend(self.calls.values());
        phases.sort();
        phases.dedup();
        phases
    }
}

/// `slot: B` of a notice, or `slot=B`.
fn slot(line: &str) -> String {
    let of_notice = line.split("slot: ").nth(1).and_then(|rest| rest.get(..1)).map(str::to_owned);
    of_notice.or_else(|| field(line, "slot")).unwrap_or_default()
}

/// Which call a line belongs to.
fn call(line: &str) -> Option<String> {
    let rest = line.split("rpc{id=").nth(1)?;
    rest.split(' ').next().map(str::to_owned)
}

impl Log {
    /// Of a csi-node that has this file for itself.
    pub(super) fn open(path: &Path) -> Self {
        let file = File::options().read(true).append(true).create(true).open(path).expect("a log");
        Self { file, rest: String::new(), state: State::default() }
    }

    /// Takes in what was written since.
    pub(super) fn read(&mut self) {
        let mut bytes = Vec::new();
        self.file.read_to_end(&mut bytes).expect("a log");
        self.rest.push_str(&String::from_utf8_lossy(&bytes));
        while let Some((line, rest)) = self.rest.split_once('\n') {
            self.state.take(line);
            self.rest = rest.to_owned();
        }
    }

    /// What it says that csi-node is doing now.
    pub(super) fn phases(&self) -> Vec<Phase> {
        self.state.phases()
    }

    /// Whether these volumes are served and nothing is to be made good.
    pub(super) fn is_calm<'a>(&self, mut volumes: impl Iterator<Item = &'a String>) -> bool {
        let state = &self.state;
        let calm = |uid: &String| state.serving.contains(uid) && !state.resyncing.contains(uid) && !state.rebuilding.contains(uid);
        state.leaving.is_empty() && volumes.all(calm)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(lines: &[&str]) -> Vec<Phase> {
        let mut state = State::default();
        lines.iter().for_each(|line| state.take(line));
        state.phases()
    }

    #[test]
    fn it_is_calm_when_all_is_served_and_nothing_is_to_be_made_good() {
        let calm = |lines: &[&str]| {
            let mut log = Log { file: tempfile::tempfile().unwrap(), rest: String::new(), state: State::default() };
            lines.iter().for_each(|line| log.state.take(line));
            log.is_calm([String::from("v")].iter())
        };
        let notice = |notice: &str| format!(r#"T INFO lockstep_datapath::volume: volume="v" notice={notice}"#);
        let (served, begun, ended) = (notice("Assembled"), notice("ResyncStarted { regions: 3 }"), notice("ResyncCompleted"));
        assert!(!calm(&[]) && calm(&[&served]) && !calm(&[&served, &begun]) && calm(&[&served, &begun, &ended]));
        let (begun, ended) = (notice("RebuildStarted { slot: B, fill: Dirty }"), notice("RebuildCompleted { slot: B }"));
        assert!(!calm(&[&served, &begun]) && calm(&[&served, &begun, &ended]));
    }

    #[test]
    fn a_phase_lasts_from_its_first_line_to_its_last() {
        let assembling = r#"T DEBUG lockstep_datapath::handle: assembling volume="v" in_use=true"#;
        assert_eq!(after(&[assembling]), [Phase::Recovery]);
        let not_yet = r#"T WARN volume{id="a" uid="v"}: lockstep_csi_node::mirror::resume: its mirror cannot be assembled yet; its users wait error=x"#;
        assert_eq!(after(&[assembling, not_yet]), []);
        assert_eq!(after(&[assembling, r#"T INFO lockstep_datapath::volume: volume="v" notice=Assembled"#]), []);
        let failed = r#"T WARN lockstep_datapath::volume: volume="v" notice=LegFailed { slot: B, error: Errno(5) }"#;
        let out = r#"T WARN lockstep_datapath::volume: leg is OUT volume="v" slot=B"#;
        assert_eq!(after(&[failed]), [Phase::OutRecord]);
        assert_eq!(after(&[failed, out]), []);
        let page = |what: &str, dirty: u32| {
            format!(
                r#"T DEBUG lockstep_datapath::volume: metadata {what} written volume="v" slot=A page=Bitmap {{ page: 0, dirty: {dirty} }}"#
            )
        };
        let (set, clear) = (page("is", 3), page("is", 1));
        assert_eq!(after(&[&set]), [Phase::BitmapSet]);
        assert_eq!(after(&[&set, &page("was", 3)]), []);
        assert_eq!(after(&[&set, &page("was", 3), &clear]), [Phase::BitmapClear]);
        let rpc = |text: &str| format!(r#"T INFO rpc{{id=3 method="NodeStageVolume"}}: lockstep_csi_node::x: {text}"#);
        assert_eq!(after(&[&rpc("assembled device=/dev/loop5")]), [Phase::Stage]);
        assert_eq!(after(&[&rpc("formatting the volume device=/dev/loop5")]), [Phase::Mkfs]);
        let done = r#"T INFO rpc{id=3 method="NodeStageVolume"}: lockstep_proto::rpc_log: done code=Ok took=1ms"#;
        assert_eq!(after(&[&rpc("assembled device=/dev/loop5"), done]), []);
        let staging = r#"T DEBUG rpc{id=3 method="NodeStageVolume"}: lockstep_datapath::handle: assembling volume="v" in_use=false"#;
        assert_eq!(after(&[staging]), [Phase::Assembly]);
        let refused = r#"T WARN rpc{id=3 method="NodeStageVolume"}: lockstep_proto::rpc_log: refused code=Internal took=1ms message="x""#;
        assert_eq!(after(&[staging, refused]), []);
    }
}

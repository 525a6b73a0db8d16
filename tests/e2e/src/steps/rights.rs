//! What the driver's accounts may do, and what they did: the API's audit log.

use std::{collections::BTreeSet, fs, ops::Range, sync::Mutex};

use anyhow::{Context, ensure};
use serde_json::Value;

use crate::cluster::{DRIVER, list, text};

const AUDIT: &str = "/tmp/lockstep-e2e/log/audit.json";

/// The bytes of the log that an API server wrote while it started: it forbids everything to everybody until it has read the roles.
static STARTING: Mutex<Range<u64>> = Mutex::new(0..0);

/// Starts the API server, and waits until it is ready.
pub fn while_api_starts(start: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<()> {
    let length = || fs::metadata(AUDIT).map(|log| log.len());
    let before = length()?;
    start()?;
    *STARTING.lock().expect("nobody panicked") = before..length()?;
    Ok(())
}

/// What is granted for what does not happen in each run: account, verb, resource, and when.
const SELDOM: [(&str, &str, &str, &str); 6] = [
    ("controller", "get", "storage.k8s.io/volumeattributesclasses", "a claim names one"),
    ("controller", "update", "lockstep.io/mirrorvolumes/status", "a volume that could not grow is asked to once more"),
    ("controller", "patch", "events", "the same event again"),
    ("node", "patch", "events.k8s.io/events", "the same event again"),
    ("node", "list", "persistentvolumes", "a PersistentVolume that was made by hand has a name of its own"),
    ("node", "update", "lockstep.io/localdisks", "a disk is found on another node"),
];

/// Account, verb, and resource as group/resource.
type Right = (String, String, String);

fn resource(group: &str, resource: &str, sub: &str) -> String {
    [group, resource, sub].into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join("/")
}

/// The words of a list in a rule.
fn words<'a>(rule: &'a Value, field: &str) -> impl Iterator<Item = &'a str> {
    rule[field].as_array().into_iter().flatten().filter_map(Value::as_str)
}

/// What one rule of a role gives to an account.
fn rights_of(account: &str, rule: &Value) -> impl Iterator<Item = Right> {
    let resources = words(rule, "apiGroups").flat_map(move |group| words(rule, "resources").map(move |what| resource(group, what, "")));
    resources.flat_map(move |what| words(rule, "verbs").map(move |verb| (account.to_owned(), verb.to_owned(), what.clone())))
}

fn granted() -> anyhow::Result<BTreeSet<Right>> {
    let mut rights = BTreeSet::new();
    for (bindings, roles) in [("clusterrolebindings", "clusterroles"), ("rolebindings", "roles")] {
        let roles = list(&[roles, "-n", DRIVER, "-l", "app.kubernetes.io/name=lockstep"])?;
        for binding in list(&[bindings, "-n", DRIVER, "-l", "app.kubernetes.io/name=lockstep"])? {
            let name = text(&binding, "/roleRef/name");
            let role = roles.iter().find(|role| text(role, "/metadata/name") == name).context("a binding without a role")?;
            let account = text(&binding, "/subjects/0/name");
            rights.extend(role["rules"].as_array().into_iter().flatten().flat_map(|rule| rights_of(account, rule)));
        }
    }
    Ok(rights)
}

pub fn all() -> anyhow::Result<String> {
    let (mut used, mut forbidden) = (BTreeSet::new(), BTreeSet::new());
    let (starting, mut at) = (STARTING.lock().expect("nobody panicked").clone(), 0);
    for line in fs::read_to_string(AUDIT)?.split_inclusive('\n') {
        at += line.len() as u64;
        let entry: Value = serde_json::from_str(line)?;
        let Some(account) = text(&entry, "/user/username").strip_prefix("system:serviceaccount:lockstep-system:") else { continue };
        let what = ["/objectRef/apiGroup", "/objectRef/resource", "/objectRef/subresource"].map(|field| text(&entry, field));
        let right = (account.to_owned(), text(&entry, "/verb").to_owned(), resource(what[0], what[1], what[2]));
        if entry.pointer("/responseStatus/code") == Some(&Value::from(403)) {
            if !starting.contains(&(at - 1)) {
                forbidden.insert(right);
            }
        } else {
            used.insert(right);
        }
    }
    ensure!(forbidden.is_empty(), "forbidden: {forbidden:?}");
    let granted = granted()?;
    ensure!(used.iter().any(|right| granted.contains(right)), "the audit log has nothing of them");
    let seldom: BTreeSet<Right> =
        SELDOM.iter().map(|(account, verb, what, _)| (format!("lockstep-{account}"), (*verb).into(), (*what).into())).collect();
    // An API server that cannot send what there is with the changes is asked for a list first.
    let watched = |(account, verb, what): &Right| verb == "list" && granted.contains(&(account.clone(), "watch".into(), what.clone()));
    let needless: Vec<_> = granted.difference(&used).filter(|right| !seldom.contains(right) && !watched(right)).collect();
    // Some steps alone use some rights alone.
    ensure!(needless.is_empty() || !crate::some().is_empty(), "granted, and never used: {needless:?}");
    let stale: Vec<_> = seldom.difference(&granted).collect();
    ensure!(stale.is_empty(), "not granted any more: {stale:?}");
    Ok(format!("{} of {} rights were used", granted.intersection(&used).count(), granted.len()))
}

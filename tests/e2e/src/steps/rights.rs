//! What the driver's accounts may do, and what they did: the API's audit log.

use std::{collections::BTreeSet, fs};

use anyhow::{Context, ensure};
use serde_json::Value;

use crate::cluster::{DRIVER, list, text};

const AUDIT: &str = "/tmp/lockstep-e2e/log/audit.json";

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
    for line in fs::read_to_string(AUDIT)?.lines() {
        let entry: Value = serde_json::from_str(line)?;
        let Some(account) = text(&entry, "/user/username").strip_prefix("system:serviceaccount:lockstep-system:") else { continue };
        let what = ["/objectRef/apiGroup", "/objectRef/resource", "/objectRef/subresource"].map(|field| text(&entry, field));
        let right = (account.to_owned(), text(&entry, "/verb").to_owned(), resource(what[0], what[1], what[2]));
        if entry.pointer("/responseStatus/code") == Some(&Value::from(403)) {
            forbidden.insert(right);
        } else {
            used.insert(right);
        }
    }
    ensure!(forbidden.is_empty(), "forbidden: {forbidden:?}");
    let granted = granted()?;
    ensure!(used.iter().any(|right| granted.contains(right)), "the audit log has nothing of them");
    for (account, verb, what) in granted.difference(&used) {
        println!("unused: {account} {verb} {what}");
    }
    Ok(format!("{} of {} rights were used", granted.intersection(&used).count(), granted.len()))
}

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

fn granted() -> anyhow::Result<BTreeSet<Right>> {
    let mut rights = BTreeSet::new();
    for (bindings, roles) in [("clusterrolebindings", "clusterroles"), ("rolebindings", "roles")] {
        let roles = list(&[roles, "-n", DRIVER, "-l", "app.kubernetes.io/name=lockstep"])?;
        for binding in list(&[bindings, "-n", DRIVER, "-l", "app.kubernetes.io/name=lockstep"])? {
            let name = text(&binding, "/roleRef/name");
            let role = roles.iter().find(|role| text(role, "/metadata/name") == name).context("a binding without a role")?;
            let words = |rule: &Value, field: &str| -> Vec<String> {
                rule[field].as_array().into_iter().flatten().filter_map(Value::as_str).map(str::to_owned).collect()
            };
            for rule in role["rules"].as_array().into_iter().flatten() {
                for group in words(rule, "apiGroups") {
                    for what in words(rule, "resources") {
                        for verb in words(rule, "verbs") {
                            rights.insert((text(&binding, "/subjects/0/name").to_owned(), verb, resource(&group, &what, "")));
                        }
                    }
                }
            }
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
    Ok(format!("{} of {} rights were used", granted.intersection(&used).count(), granted.len()))
}

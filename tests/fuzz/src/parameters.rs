//! The parameters of a StorageClass.

use std::collections::BTreeMap;

use crate::volume_parameters::{Parameters, Transport, WriteBehind, claim, own, parse};

/// Lines `name=value`. A first letter may stand for a whole word, so that a fuzzer need not spell.
pub fn parameters(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let word = |text: &str| {
        let known = ["provisioning", "thick", "transport", "auto", "fuse", "csi.storage.k8s.io/fstype", "writeBehind", "off", "rotational"];
        let short = known.into_iter().zip(["%p", "%t", "%r", "%a", "%f", "%c", "%w", "%o", "%l"]);
        short.fold(text.to_owned(), |text, (word, short)| text.replace(short, word))
    };
    let given = text.lines().take(64).map(|line| line.split_once('=').unwrap_or((line, "")));
    let given: BTreeMap<String, String> = given.map(|(name, value)| (word(name), word(value))).collect();
    let ours = own(&given);
    assert!(ours.iter().all(|(name, value)| given.get(name) == Some(value) && !name.starts_with("csi.storage.k8s.io/")));
    assert_eq!(claim(&ours), None, "whose the volume is only the sidecars say");
    let parsed = parse(&given);
    assert_eq!(parse(&ours), parsed, "what the sidecars add changes nothing");
    match parsed {
        Ok(parsed) => {
            assert!(ours.keys().all(|name| ["provisioning", "transport", "writeBehind"].contains(&name.as_str())));
            assert_eq!(parse(&encode(parsed)), Ok(parsed));
            // Nothing is taken for a default that was given.
            for (name, default) in [("transport", "auto"), ("writeBehind", "off")] {
                let value = ours.get(name).map_or(default, String::as_str);
                assert_eq!(encode(parsed).get(name).map(String::as_str), Some(value));
            }
        }
        Err(error) => {
            let said = error.to_string();
            assert!(ours.keys().any(|name| said.contains(&format!("{name:?}")) || said.contains(name.as_str())), "{said}");
        }
    }
}

fn encode(Parameters { transport, write_behind }: Parameters) -> BTreeMap<String, String> {
    let transport = match transport {
        Transport::Auto => "auto",
        Transport::Fuse => "fuse",
    };
    let write_behind = match write_behind {
        WriteBehind::Off => "off",
        WriteBehind::Rotational => "rotational",
    };
    let all = [("provisioning", "thick"), ("transport", transport), ("writeBehind", write_behind)];
    all.into_iter().map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
}

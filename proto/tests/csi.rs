//! Our csi.proto against the specification's own, field by field.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    process::Command,
};

use prost_reflect::{DescriptorPool, DynamicMessage, EnumDescriptor, ExtensionDescriptor, Kind, MessageDescriptor, ServiceDescriptor};

const MODULE: &str = "github.com/container-storage-interface/spec@v1.13.0";
/// The services that we leave out.
const OTHERS: [&str; 2] = ["csi.v1.GroupController", "csi.v1.SnapshotMetadata"];

/// What a protocol is made of: the full name of each part, and everything about it that the other side can notice.
type Facts = BTreeMap<String, String>;

fn compiled(dir: &Path) -> DescriptorPool {
    let mut compiler = protox::Compiler::new([dir]).unwrap();
    compiler.open_file("csi.proto").unwrap_or_else(|error| panic!("{}: {error}", dir.display()));
    compiler.descriptor_pool()
}

fn upstream() -> PathBuf {
    let output = Command::new("go").args(["mod", "download", "-json", MODULE]).current_dir(std::env::temp_dir()).output();
    let output = output.unwrap_or_else(|error| panic!("this test reads {MODULE} by way of go, which does not start: {error}. Install go"));
    let answer = String::from_utf8_lossy(&output.stdout);
    let json: serde_json::Value = serde_json::from_str(&answer).unwrap_or_else(|_| panic!("{}", String::from_utf8_lossy(&output.stderr)));
    PathBuf::from(json["Dir"].as_str().unwrap_or_else(|| panic!("{MODULE} cannot be had: {answer}")))
}

fn options(message: &DynamicMessage) -> String {
    let own = message.fields().map(|(field, value)| format!("{}={value}", field.name()));
    let extensions = message.extensions().map(|(extension, value)| format!("{}={value}", extension.full_name()));
    own.chain(extensions).collect::<BTreeSet<_>>().into_iter().collect::<Vec<_>>().join(",")
}

fn kind(kind: &Kind) -> String {
    match kind {
        Kind::Message(message) => format!("message {}", message.full_name()),
        Kind::Enum(names) => format!("enum {}", names.full_name()),
        scalar => format!("{scalar:?}"),
    }
}

fn add_message(facts: &mut Facts, message: &MessageDescriptor) {
    let reserved: Vec<_> = message.reserved_ranges().collect();
    facts.insert(message.full_name().into(), format!("message [{}] reserved {reserved:?}", options(&message.options())));
    for field in message.fields() {
        let oneof = field.containing_oneof().map(|oneof| oneof.name().to_owned());
        let fact = format!(
            "field {} {:?} {} oneof {oneof:?} presence {} map {} [{}]",
            field.number(),
            field.cardinality(),
            kind(&field.kind()),
            field.supports_presence(),
            field.is_map(),
            options(&field.options()),
        );
        facts.insert(field.full_name().into(), fact);
    }
}

fn add_enum(facts: &mut Facts, names: &EnumDescriptor) {
    let reserved: Vec<_> = names.reserved_ranges().collect();
    facts.insert(names.full_name().into(), format!("enum [{}] reserved {reserved:?}", options(&names.options())));
    for value in names.values() {
        // By protobuf's scoping rule the full name does not have the enum's.
        let name = format!("{}.{}", names.full_name(), value.name());
        facts.insert(name, format!("value {} [{}]", value.number(), options(&value.options())));
    }
}

fn add_service(facts: &mut Facts, service: &ServiceDescriptor) {
    facts.insert(service.full_name().into(), format!("service [{}]", options(&service.options())));
    for method in service.methods() {
        let fact = format!(
            "method {} -> {} streams {} {} [{}]",
            method.input().full_name(),
            method.output().full_name(),
            method.is_client_streaming(),
            method.is_server_streaming(),
            options(&method.options()),
        );
        facts.insert(method.full_name().into(), fact);
    }
}

fn add_extension(facts: &mut Facts, extension: &ExtensionDescriptor) {
    let extended = extension.containing_message();
    let fact =
        format!("option {} {:?} {} of {}", extension.number(), extension.cardinality(), kind(&extension.kind()), extended.full_name());
    facts.insert(extension.full_name().into(), fact);
}

/// All that a csi.proto says.
fn facts(pool: &DescriptorPool) -> Facts {
    let (mut facts, ours) = (Facts::new(), |name: &str| name.starts_with("csi.v1."));
    pool.all_messages().filter(|message| ours(message.full_name())).for_each(|message| add_message(&mut facts, &message));
    pool.all_enums().filter(|names| ours(names.full_name())).for_each(|names| add_enum(&mut facts, &names));
    pool.services().for_each(|service| add_service(&mut facts, &service));
    pool.all_extensions().for_each(|extension| add_extension(&mut facts, &extension));
    facts
}

fn reach(facts: &mut Facts, message: &MessageDescriptor) {
    if !message.full_name().starts_with("csi.v1.") || facts.contains_key(message.full_name()) {
        return;
    }
    add_message(facts, message);
    for field in message.fields() {
        match field.kind() {
            Kind::Message(inner) => reach(facts, &inner),
            Kind::Enum(names) => add_enum(facts, &names),
            _ => {}
        }
    }
}

/// What our services need of it, and the options.
fn needed(pool: &DescriptorPool) -> Facts {
    let mut facts = Facts::new();
    for service in pool.services().filter(|service| !OTHERS.contains(&service.full_name())) {
        add_service(&mut facts, &service);
        for method in service.methods() {
            reach(&mut facts, &method.input());
            reach(&mut facts, &method.output());
        }
    }
    pool.all_extensions().for_each(|extension| add_extension(&mut facts, &extension));
    facts
}

#[test]
fn our_csi_proto_says_what_the_specification_says_field_by_field() {
    let (ours, theirs) = (compiled(Path::new(env!("CARGO_MANIFEST_DIR"))), compiled(&upstream()));
    let (ours, theirs, needed) = (facts(&ours), facts(&theirs), needed(&theirs));
    let differing = ours.iter().filter(|(name, fact)| theirs.get(*name) != Some(fact));
    let mut wrong: Vec<String> =
        differing.map(|(name, fact)| format!("{name}\n  ours   {fact}\n  theirs {:?}", theirs.get(name))).collect();
    wrong.extend(needed.keys().filter(|name| !ours.contains_key(*name)).map(|name| format!("{name} is missing in ours")));
    assert!(wrong.is_empty(), "{} differences:\n{}", wrong.len(), wrong.join("\n"));
    // The comparison sees options: a secret is one.
    let secret = &ours["csi.v1.CreateVolumeRequest.secrets"];
    assert!(secret.contains("csi.v1.csi_secret=true") && secret.contains("map true"), "{secret}");
    assert!(ours.len() > 350, "only {} facts", ours.len());
}

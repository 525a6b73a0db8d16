//! The shape of the repository: which crate may know which, how long a file gets, what nobody leaves behind.
#![allow(missing_docs)]

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

/// Who may depend on whom, of ours. What is not named here is a test, which may know everybody and whom nobody may know.
const ARROWS: [(&str, &[&str]); 7] = [
    ("lockstep-core", &[]),
    ("lockstep-datapath", &["lockstep-core", "lockstep-fuse-holder"]),
    ("lockstep-fuse-holder", &[]),
    ("lockstep-proto", &[]),
    ("lockstep-store", &["lockstep-proto"]),
    ("lockstep-csi-controller", &["lockstep-proto", "lockstep-store"]),
    ("lockstep-csi-node", &["lockstep-datapath", "lockstep-proto", "lockstep-store"]),
];
const LINES: usize = 600;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().expect("the workspace")
}

/// Every file below, but for what is hidden or built.
fn files(directory: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(directory).expect("readable").flatten() {
        let (path, name) = (entry.path(), entry.file_name());
        if name.to_string_lossy().starts_with('.') || name == "target" {
            continue;
        }
        if path.is_dir() { files(&path, found) } else { found.push(path) }
    }
}

fn named(ending: &str) -> Vec<(PathBuf, String)> {
    let mut found = Vec::new();
    files(&root(), &mut found);
    let wanted = found.into_iter().filter(|path| path.to_string_lossy().ends_with(ending));
    let files: Vec<_> = wanted.map(|path| (path.clone(), fs::read_to_string(path).expect("text"))).collect();
    assert!(!files.is_empty(), "no {ending} was found");
    files
}

/// By crate: the crates of ours that it names as a dependency of any kind.
fn dependencies() -> BTreeMap<String, BTreeSet<String>> {
    let mut all = BTreeMap::new();
    for (_, manifest) in named("Cargo.toml") {
        let (mut name, mut section, mut ours) = (None, "", BTreeSet::new());
        for line in manifest.lines() {
            let key = line.split(['=', '.', ' ']).next().unwrap_or_default();
            if line.starts_with('[') {
                section = line;
            } else if section == "[package]" && key == "name" {
                name = line.split('"').nth(1).map(str::to_owned);
            } else if section.ends_with("dependencies]") && key.starts_with("lockstep-") {
                ours.insert(key.to_owned());
            }
        }
        if let Some(name) = name {
            all.insert(name, ours);
        }
    }
    all
}

#[test]
fn arrows_point_one_way() {
    let all = dependencies();
    for (name, allowed) in ARROWS {
        let found = all.get(name).unwrap_or_else(|| panic!("{name} is gone"));
        for other in found {
            assert!(allowed.contains(&other.as_str()), "{name} must not know {other}");
        }
    }
    assert!(all["lockstep-sim"].contains("lockstep-core"), "the manifests are not read as they are written");
}

#[test]
fn no_file_is_longer_than_its_reader_likes() {
    for (path, text) in named(".rs") {
        let lines = text.lines().count();
        assert!(lines <= LINES, "{}: {lines} lines: where is its seam?", path.display());
    }
}

#[test]
fn nothing_is_left_for_later_or_left_out() {
    let banned = [concat!("todo", "!("), concat!("unimplemented", "!("), concat!("#[ig", "nore")];
    for (path, text) in named(".rs") {
        for word in banned {
            assert!(!text.contains(word), "{}: {word}", path.display());
        }
    }
}

/// A program is not built once more for tests that it does not have (`test = false`): so it must have none.
#[test]
fn tests_are_in_libraries_and_beside_them_and_never_in_a_program() {
    for (manifest, text) in named("Cargo.toml") {
        let sources = manifest.with_file_name("src");
        let untested_library = text.contains("[lib]\ntest = false");
        let mut found = Vec::new();
        if sources.is_dir() {
            files(&sources, &mut found);
        }
        for path in found {
            let program = path.ends_with("src/main.rs") || path.starts_with(sources.join("bin")) || !sources.join("lib.rs").exists();
            let text = fs::read_to_string(&path).expect("text");
            let has_tests = [concat!("#[te", "st]"), concat!("::te", "st]"), concat!("::te", "st(")].iter().any(|mark| text.contains(mark));
            assert!(!(program || untested_library) || !has_tests, "{}: nobody runs its tests", path.display());
        }
    }
}

#[test]
fn what_the_simulator_says_broke_is_an_oracle_with_its_rules() {
    let said = [concat!("breaks", "(\""), concat!("check", "(\""), concat!("caught", "(\"")];
    let mut found = BTreeSet::new();
    for (path, text) in named(".rs") {
        let names = said.iter().flat_map(|begin| text.split(begin).skip(1)).filter_map(|rest| rest.split('"').next());
        if path.to_string_lossy().contains("tests/sim/src/simulator") {
            found.extend(names.map(str::to_owned));
        }
    }
    assert!(found.contains("bounds"), "the sources are not read as they are written");
    let oracles: BTreeSet<String> = lockstep_sim::simulator::ORACLES.iter().map(|(name, _)| (*name).to_owned()).collect();
    assert_eq!(found, oracles);
}

/// The numbers of a test that is named after cases: `case_15_and_16_a_flush`.
fn cases_of(test: &str) -> Vec<usize> {
    let mut cases = Vec::new();
    let mut words = test.strip_prefix("case_").into_iter().flat_map(|rest| rest.split('_')).peekable();
    while let Some(case) = words.next().and_then(|word| word.parse().ok()) {
        cases.push(case);
        if words.next_if_eq(&"and").is_none() {
            break;
        }
    }
    cases
}

/// The names of all tests.
fn tests() -> BTreeSet<String> {
    let mut tests = BTreeSet::new();
    for (_, text) in named(".rs") {
        let named = |line: &str| line.trim_start().trim_start_matches("async ").strip_prefix("fn ")?.split('(').next().map(str::to_owned);
        tests.extend(
            text.lines()
                .zip(text.lines().skip(1))
                .filter(|(mark, _)| mark.contains("test]") || mark.contains("::test("))
                .filter_map(|(_, line)| named(line)),
        );
    }
    tests
}

#[test]
fn each_seed_that_found_something_names_its_test_and_the_mutant_that_this_test_catches() {
    let tests = tests();
    let mut seeds = 0;
    for (seed, what) in lockstep_sim::simulator::regressions() {
        let (_, names) = what.rsplit_once(": ").expect("what it was: test, mutant");
        let (test, mutant) = names.split_once(", ").expect("test, mutant");
        assert!(tests.contains(test), "{seed}: no such test: {test}");
        let patch = fs::read_to_string(root().join(format!("tests/mutants/{mutant}.patch"))).expect(mutant);
        let catches = patch.lines().find_map(|line| line.strip_prefix("test: ")).expect("a test");
        assert!(test.starts_with(catches), "{seed}: {mutant} is for another test: {catches}");
        seeds += 1;
    }
    assert!(seeds > 0);
}

#[test]
fn each_case_of_the_contract_names_tests_that_exist_and_all_that_are_named_after_it() {
    let tests = tests();
    let design = fs::read_to_string(root().join("datapath/DESIGN.md")).expect("text");
    let (_, table) = design.split_once("| Case | Proven by |\n|---|---|\n").expect("the table");
    for (n, row) in table.lines().take_while(|line| line.starts_with('|')).enumerate() {
        let case = n + 1;
        assert!(row.starts_with(&format!("| {case} | `")), "case {case}: {row}");
        let listed: BTreeSet<String> = row.split('`').skip(1).step_by(2).map(str::to_owned).collect();
        let missing: Vec<_> = listed.difference(&tests).collect();
        assert!(missing.is_empty(), "case {case}: no such test: {missing:?}");
        let unlisted: Vec<_> = tests.iter().filter(|test| cases_of(test).contains(&case) && !listed.contains(*test)).collect();
        assert!(unlisted.is_empty(), "case {case} does not list {unlisted:?}");
    }
    assert_eq!(table.lines().take_while(|line| line.starts_with('|')).count(), 54, "cases");
}

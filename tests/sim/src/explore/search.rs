//! The search: breadth first, so that the first way to a broken oracle is a shortest one.

use std::{
    collections::HashSet,
    hash::{BuildHasherDefault, Hash, Hasher},
};

use siphasher::sip128::{Hasher128, SipHasher13};

use super::{
    Broken, caught,
    client::Ask,
    crash::Crashes,
    disks::{BLOCKS, Pages, Token},
    recovery::{Image, Recoveries, settle, start},
    scenarios::{Begin, Scenario},
    world::{Event, PROBES, World},
};

/// What was looked at.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counts {
    /// Different states.
    pub states: u64,
    /// Events that led to one, new or known.
    pub transitions: u64,
    /// States whose disks and answers were new, so that a crash there was.
    pub crashes: u64,
    /// Images that those crashes left.
    pub images: u64,
    /// Events of the longest way.
    pub depth: u64,
    /// States that waited to be looked at, at most.
    pub frontier: u64,
}

impl Counts {
    /// Adds another scenario's.
    pub fn add(&mut self, other: &Self) {
        self.states += other.states;
        self.transitions += other.transitions;
        self.crashes += other.crashes;
        self.images += other.images;
        self.depth = self.depth.max(other.depth);
        self.frontier = self.frontier.max(other.frontier);
    }
}

/// A way to a broken oracle.
#[derive(Clone, Debug)]
pub struct Failure {
    /// What broke.
    pub broken: Broken,
    /// What happened, in order.
    pub events: Vec<Event>,
    /// The crash at the end of it, if there was one.
    pub crash: Option<(Image, bool)>,
}

/// Takes a fingerprint for its own hash: it is one.
#[derive(Clone, Copy, Debug, Default)]
struct Itself(u64);

impl Hasher for Itself {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        self.0 = bytes.iter().take(8).fold(self.0, |hash, byte| hash << 8 | u64::from(*byte));
    }
    fn write_u128(&mut self, fingerprint: u128) {
        self.0 = fingerprint as u64;
    }
}

type Known = HashSet<u128, BuildHasherDefault<Itself>>;

fn fingerprint(value: &impl Hash) -> u128 {
    let mut hasher = SipHasher13::new();
    value.hash(&mut hasher);
    hasher.finish128().as_u128()
}

/// What is kept from scenario to scenario.
#[derive(Debug, Default)]
pub struct Explorer {
    pages: Pages,
    recoveries: Recoveries,
    oracles_alone: bool,
}

impl Explorer {
    /// An explorer; with `oracles_alone`, without the core's own assertions.
    pub fn new(oracles_alone: bool) -> Self {
        Self { oracles_alone, ..Self::default() }
    }

    /// How many different images were recovered.
    pub fn images(&self) -> usize {
        self.recoveries.images()
    }

    /// Every state of a scenario. `progress` hears of it now and then.
    pub fn explore(&mut self, scenario: &Scenario, counts: &mut Counts, mut progress: impl FnMut(&Counts)) -> Result<(), Failure> {
        let mut search = Search { scenario, states: Known::default(), crashes: Known::default(), ways: Vec::new() };
        let first = self.root(scenario).map_err(|broken| Failure { broken, events: Vec::new(), crash: None })?;
        let mut layer = vec![(0, first)];
        search.ways.push((0, Event::Tick));
        let mut events = Vec::new();
        self.look(&mut search, 0, &layer[0].1, counts)?;
        while !layer.is_empty() {
            let mut next = Vec::new();
            for (number, (at, world)) in layer.into_iter().enumerate() {
                if number % 1024 == 0 {
                    progress(counts);
                }
                world.events(scenario, &mut events);
                let last = events.len();
                let mut world = Some(world);
                for (number, event) in events.iter().enumerate() {
                    counts.transitions += 1;
                    // The last event may have the state itself.
                    let before = if number + 1 == last { world.take() } else { world.clone() };
                    let Some(mut after) = before else { break };
                    let happened = caught(|| after.happens(scenario, *event, &mut self.pages)).and_then(|result| result);
                    let fingerprint = fingerprint(&after);
                    if happened.is_ok() && !search.states.insert(fingerprint) {
                        continue;
                    }
                    let here = search.ways.len() as u32;
                    search.ways.push((at, *event));
                    if let Err(broken) = happened {
                        return Err(search.failure(here, broken, None));
                    }
                    self.look(&mut search, here, &after, counts)?;
                    next.push((here, after));
                }
            }
            counts.depth += u64::from(!next.is_empty());
            counts.frontier = counts.frontier.max(next.len() as u64);
            layer = next;
        }
        Ok(())
    }

    /// The state that a scenario begins with.
    fn root(&mut self, scenario: &Scenario) -> Result<World, Broken> {
        let (mut legs, witness) = self.pages.new_volume(scenario.blocks());
        if scenario.begin == Begin::Unclean {
            self.pages.not_equal(&mut legs, scenario.base);
        }
        let image = Image { legs: legs.map(Some), witness: Some(witness), base: scenario.base };
        let (mut world, _) = start(scenario, &image, &mut self.pages).map_err(|text| Broken::new("availability", text))?;
        if scenario.begin == Begin::New {
            settle(&mut world, scenario, &mut self.pages)?;
        }
        Ok(world)
    }

    /// The oracles of one new state.
    fn look(&mut self, search: &mut Search<'_>, here: u32, world: &World, counts: &mut Counts) -> Result<(), Failure> {
        counts.states += 1;
        let scenario = search.scenario;
        let looked = caught(|| {
            if !self.oracles_alone {
                world.mirror().check_invariants();
            }
            if world.quiet() {
                world.check_quiet(scenario)?;
            }
            self.probe(scenario, world)
        });
        looked.and_then(|result| result).map_err(|broken| search.failure(here, broken, None))?;
        let remains = world.remains(scenario, &mut self.pages);
        let client = &world.client;
        if !search.crashes.insert(fingerprint(&(&remains, client.floor, client.flushed, client.planned()))) {
            return Ok(());
        }
        counts.crashes += 1;
        let mut crashes = Crashes { scenario, client, recoveries: &mut self.recoveries, pages: &mut self.pages, looked: 0 };
        let broken = crashes.all(&remains);
        counts.images += crashes.looked;
        broken.map_err(|crash| search.failure(here, crash.broken, Some((crash.image, crash.cut))))
    }

    /// Reads of every block, twice, each served at once: what a client would see now. Where all disks hold the same, that is what it is.
    fn probe(&mut self, scenario: &Scenario, world: &World) -> Result<(), Broken> {
        let mut asked: Option<World> = None;
        for block in 0..BLOCKS {
            let (mut least, mut before) = (world.client.floor[block], None);
            let same = world.same(block);
            for round in 0..2 {
                let value = match same {
                    Some(value) => value,
                    None => match self.read(asked.get_or_insert_with(|| world.clone()), scenario, block, round)? {
                        Some(value) => value,
                        // One that waits for a write is not answered yet.
                        None => break,
                    },
                };
                let version = world.client.version(scenario, block, value, least).filter(|version| {
                    // What was there at first may be one thing or another, but not in turn.
                    *version > least || before.is_none_or(|before| before == value)
                });
                least = version.ok_or_else(|| {
                    let text = format!("a read of block {block} returns {value}, but nothing older than version {least} may be read");
                    Broken::new("reads are linearizable", text)
                })?;
                before = Some(value);
                if same.is_some() {
                    break;
                }
            }
        }
        Ok(())
    }

    fn read(&mut self, world: &mut World, scenario: &Scenario, block: usize, round: usize) -> Result<Option<Token>, Broken> {
        let tag = lockstep_core::units::Tag(PROBES + (block * 2 + round) as u64);
        world.submit(scenario, tag, Ask::Read { block: block as u8 }, &mut self.pages)?;
        while let Some(index) = world.reading(tag) {
            world.done(scenario, index, &mut self.pages)?;
        }
        Ok(world.probed.iter().find(|(answered, _)| *answered == tag).map(|(_, content)| content[0]))
    }

    /// A failure, event by event, in words.
    pub fn tell(&mut self, scenario: &Scenario, failure: &Failure) -> String {
        let (broken, events) = (&failure.broken, failure.events.len());
        let mut text = format!("broken: {} after {events} events\n{}\n{}\n", broken.oracle, broken.text, scenario.name());
        let Ok(mut world) = self.root(scenario) else { return text };
        for (number, event) in failure.events.iter().enumerate() {
            let what = match event {
                Event::Submit(index) => format!("submitted: {}", scenario.asks[*index]),
                Event::Done(index) => format!("done: {}", world.describe(*index)),
                Event::Fail(index, left) => format!("fails, leaving what is {left:?}: {}", world.describe(*index)),
                Event::Again(index) => format!("a moment's fault of the host: {}", world.describe(*index)),
                Event::Tick => "the time comes that the mirror waits for".to_owned(),
                Event::Return(slot) => format!("leg {slot:?} returns"),
                Event::Hang(slot) => format!("leg {slot:?} hangs, its deadline passes"),
            };
            text += &format!("{:4}. {what}\n", number + 1);
            if caught(|| world.happens(scenario, *event, &mut self.pages)).is_err() {
                break;
            }
        }
        if let Some((image, cut)) = &failure.crash {
            text += &format!("      then {}\n", if *cut { "the power is cut" } else { "the process is killed" });
            text += &format!("      what is found: {image:?}\n");
        }
        text
    }
}

struct Search<'a> {
    scenario: &'a Scenario,
    states: Known,
    crashes: Known,
    /// By state: where it was reached from, and by what.
    ways: Vec<(u32, Event)>,
}

impl Search<'_> {
    fn failure(&self, mut at: u32, broken: Broken, crash: Option<(Image, bool)>) -> Failure {
        let mut events = Vec::new();
        while at != 0 {
            let (from, event) = self.ways[at as usize];
            events.push(event);
            at = from;
        }
        events.reverse();
        Failure { broken, events, crash }
    }
}

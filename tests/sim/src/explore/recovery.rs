//! What follows a crash: assembly and resync, in one fixed order: whatever was asked for first ends first.

use std::collections::HashMap;

use lockstep_core::{
    assembly::{Assembled, Assembly, assemble},
    format,
    io::Effects,
    membership::MemberState,
    status::LegState,
    units::{Instant, Tag},
};

use super::{
    Broken,
    client::Ask,
    disks::{BLOCKS, Leg, LegImage, PageId, Pages, Token, VOLUME},
    scenarios::{Begin, LIMITS, Scenario},
    world::{PROBES, World},
};

/// Reads of each block: as soon as it can be asked, and two when all is quiet.
const ROUNDS: u64 = 3;

/// What is found when the machine comes up again. Equal images have equal recoveries, so each is done once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Image {
    /// By slot.
    pub legs: [Option<LegImage>; 2],
    /// `None`: lost.
    pub witness: Option<[PageId; 2]>,
    /// The volume's block that is the client's block 0.
    pub base: u64,
}

/// What becomes of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Recovered {
    /// It is refused, as it must be.
    Refused,
    /// Every read of each block returns this.
    Reads([Token; BLOCKS]),
    /// An oracle broke.
    Breaks(Broken),
}

/// Recoveries, each done once.
#[derive(Debug, Default)]
pub struct Recoveries {
    known: HashMap<Image, Recovered>,
}

impl Recoveries {
    /// How many images there were.
    pub fn images(&self) -> usize {
        self.known.len()
    }

    /// What becomes of an image.
    pub fn of(&mut self, image: &Image, pages: &mut Pages) -> &Recovered {
        self.known.entry(*image).or_insert_with(|| super::caught(|| recover(image, pages)).unwrap_or_else(Recovered::Breaks))
    }
}

/// A start from an image: where the mirror came up, and what was told of legs that may return.
pub fn start(scenario: &Scenario, image: &Image, pages: &mut Pages) -> Result<(World, Assembled), String> {
    let here: Vec<usize> = (0..2).filter(|slot| image.legs[*slot].is_some()).collect();
    let metas: Vec<Vec<u8>> = image.legs.iter().flatten().map(|leg| pages.meta(leg.meta)).collect();
    let metas: Vec<&[u8]> = metas.iter().map(Vec::as_slice).collect();
    let witness = image.witness.map(|slots| pages.witness(slots));
    let assembly = Assembly {
        volume: VOLUME,
        metas: &metas,
        witness: witness.as_deref(),
        seen_epoch: None,
        force: None,
        // Not the seed of the run that ended.
        seed: 1 + image.legs.iter().flatten().count() as u128,
        now: Instant(0),
        limits: LIMITS,
    };
    let mut out = Effects::new();
    let mut assembled = assemble(&assembly, &mut out).map_err(|refusal| refusal.to_string())?;
    assembled.slots = assembled.slots.map(|found| found.map(|found| here[found]));
    assembled.returning.iter_mut().for_each(|(found, ..)| *found = here[*found]);
    let legs = assembled.slots.map(|slot| slot.and_then(|slot| image.legs[slot]).map(Leg::new));
    let slots = image.witness.unwrap_or_else(|| pages.no_witness());
    let world = World::new(scenario, assembled.mirror.clone(), legs, slots, out, pages).map_err(|broken| broken.to_string())?;
    Ok((world, assembled))
}

/// Whatever was asked for first ends first, until nothing is under way.
pub fn settle(world: &mut World, scenario: &Scenario, pages: &mut Pages) -> Result<(), Broken> {
    // A resync of a region of 16 MiB takes some hundred steps.
    for _ in 0..100_000 {
        if world.idle() {
            return world.check_quiet(scenario);
        }
        world.done(scenario, 0, pages)?;
    }
    Err(Broken::new("every request ends", "the recovery does not end"))
}

fn recover(image: &Image, pages: &mut Pages) -> Recovered {
    let scenario = Scenario {
        asks: Vec::new(),
        base: image.base,
        ticks: 0,
        fail: false,
        again: false,
        hang: false,
        returns: false,
        begin: Begin::New,
    };
    match (start(&scenario, image, pages), expected(image, pages)) {
        (Ok(_), Expected::Refused) => Recovered::Breaks(Broken::new("no stale leg", "assembled from a leg that may not say who counts")),
        (Err(refusal), Expected::Served) => Recovered::Breaks(Broken::new("availability", format!("refused: {refusal}"))),
        (Err(_), Expected::Refused | Expected::Either) => Recovered::Refused,
        (Ok((world, assembled)), Expected::Served | Expected::Either) => match serve(world, &assembled, &scenario, image, pages) {
            Ok(values) => Recovered::Reads(values),
            Err(broken) => Recovered::Breaks(broken),
        },
    }
}

enum Expected {
    Served,
    Refused,
    Either,
}

/// Both legs are there: served. One alone: if the witness counts it. If a slot of the witness is torn, nobody can tell whether what it said
/// decides, and one leg alone may be refused; what it returns if it is not is judged as ever.
fn expected(image: &Image, pages: &Pages) -> Expected {
    if image.legs.iter().all(Option::is_some) {
        return Expected::Served;
    }
    let Some(witness) = image.witness.map(|slots| pages.witness(slots)) else { return Expected::Refused };
    let Ok((superblock, _)) = format::witness(&witness) else { return Expected::Refused };
    if format::witness_is_doubtful(&witness) {
        return Expected::Either;
    }
    let members = superblock.record.members.iter().zip(&image.legs);
    let counted = members.into_iter().any(|(member, leg)| leg.is_some() && member.state == MemberState::In);
    if counted { Expected::Served } else { Expected::Refused }
}

/// Reads everything at once and again when all is quiet, also after the leg that is OUT has returned; all must say the same.
fn serve(
    mut world: World,
    assembled: &Assembled,
    scenario: &Scenario,
    image: &Image,
    pages: &mut Pages,
) -> Result<[Token; BLOCKS], Broken> {
    let mut rounds = Vec::new();
    rounds.push(read_all(&mut world, scenario, 0, pages)?);
    for round in 1..ROUNDS {
        rounds.push(read_all(&mut world, scenario, round, pages)?);
    }
    for (found, slot, fill) in &assembled.returning {
        let Some(leg) = image.legs[*found] else { continue };
        let summary = format::peek(&pages.meta(leg.meta)).map_err(|error| Broken::new("a leg returns", error.to_string()))?;
        world.legs[slot.index()] = Some(Leg::new(leg));
        world.attach(scenario, *slot, &summary, *fill, pages)?;
        for round in 0..2 {
            rounds.push(read_all(&mut world, scenario, ROUNDS + round, pages)?);
        }
    }
    if rounds.iter().any(|values| *values != rounds[0]) {
        return Err(Broken::new("what was read once is read again", format!("one after the other: {rounds:?}")));
    }
    let status = world.mirror().status();
    if image.legs.iter().all(Option::is_some) && status.legs.iter().any(|leg| leg.state != LegState::In) {
        return Err(Broken::new("a leg returns", format!("both were there, and the mirror says {status:?}")));
    }
    Ok(rounds[0])
}

/// Reads every block, and lets everything end.
fn read_all(world: &mut World, scenario: &Scenario, round: u64, pages: &mut Pages) -> Result<[Token; BLOCKS], Broken> {
    let tag = |block: usize| Tag(PROBES + round * BLOCKS as u64 + block as u64);
    for block in 0..BLOCKS {
        world.submit(scenario, tag(block), Ask::Read { block: block as u8 }, pages)?;
    }
    settle(world, scenario, pages)?;
    let mut values = [0; BLOCKS];
    for (block, value) in values.iter_mut().enumerate() {
        let answer = world.probed.iter().find(|(answered, _)| *answered == tag(block));
        *value = answer.ok_or_else(|| Broken::new("every request ends", format!("the read of block {block} is not answered")))?.1[0];
    }
    Ok(values)
}

//! A crash in a state: every image that it may leave, and what may be read afterwards.

use super::{
    Broken,
    client::{Client, Versions},
    disks::{BLOCKS, LegImage, PAGES, PageId, Pages, Token, TokenSet, tokens},
    recovery::{Image, Recovered, Recoveries},
    scenarios::Scenario,
    world::Remains,
};

/// What a crash did to break an oracle.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Crash {
    /// What was found.
    pub image: Image,
    /// The machine lost its power, not only the process its life.
    pub cut: bool,
    /// What broke.
    pub broken: Broken,
}

/// Crashes of one state.
#[derive(Debug)]
pub struct Crashes<'a> {
    /// In which scenario.
    pub scenario: &'a Scenario,
    /// What was asked and answered before.
    pub client: &'a Client,
    /// Images and what became of them.
    pub recoveries: &'a mut Recoveries,
    /// Pages of metadata.
    pub pages: &'a mut Pages,
    /// How many images were looked at.
    pub looked: u64,
}

impl Crashes<'_> {
    /// Every image of every crash; what breaks first.
    pub fn all(&mut self, remains: &Remains) -> Result<(), Crash> {
        let killed: [Vec<LegImage>; 2] = std::array::from_fn(|slot| leg_images(&remains.killed[slot], &remains.meta[slot]));
        let cut: [Vec<LegImage>; 2] = std::array::from_fn(|slot| leg_images(&remains.cut[slot], &remains.meta[slot]));
        let (floor, flushed) = (self.client.floor, self.client.flushed);
        let mut witnesses: Vec<Option<[PageId; 2]>> = vec![None];
        for a in &remains.witness[0] {
            witnesses.extend(remains.witness[1].iter().map(|b| Some([*a, *b])));
        }
        for witness in witnesses {
            for (legs, least, is_cut) in [(&killed, floor, false), (&cut, flushed, true)] {
                for a in &legs[0] {
                    for b in &legs[1] {
                        self.one([Some(*a), Some(*b)], witness, least, is_cut)?;
                    }
                    self.one([Some(*a), None], witness, least, is_cut)?;
                }
                for b in &legs[1] {
                    self.one([None, Some(*b)], witness, least, is_cut)?;
                }
            }
        }
        Ok(())
    }

    fn one(&mut self, legs: [Option<LegImage>; 2], witness: Option<[PageId; 2]>, least: Versions, cut: bool) -> Result<(), Crash> {
        self.looked += 1;
        let image = Image { legs, witness, base: self.scenario.base };
        let broken = match self.recoveries.of(&image, self.pages) {
            Recovered::Refused => return Ok(()),
            Recovered::Breaks(broken) => broken.clone(),
            Recovered::Reads(values) => match lost(self.scenario, self.client, *values, least) {
                Ok(()) => return Ok(()),
                Err(text) => Broken::new(if cut { "what was flushed survives" } else { "what was answered survives" }, text),
            },
        };
        Err(Crash { image, cut, broken })
    }
}

/// Whether these values may be read, when nothing older than `least` may.
fn lost(scenario: &Scenario, client: &Client, values: [Token; BLOCKS], least: Versions) -> Result<(), String> {
    for (block, value) in values.into_iter().enumerate() {
        if client.version(scenario, block, value, least[block]).is_none() {
            return Err(format!("block {block} reads {value}, but nothing older than version {} may be read", least[block]));
        }
    }
    Ok(())
}

fn leg_images(blocks: &[TokenSet; BLOCKS], meta: &[Vec<PageId>; PAGES]) -> Vec<LegImage> {
    let mut images = vec![LegImage { blocks: [0; BLOCKS], meta: [0; PAGES] }];
    for (block, set) in blocks.iter().enumerate() {
        let with = |image: LegImage| {
            tokens(*set).map(move |token| {
                let mut image = image;
                image.blocks[block] = token;
                image
            })
        };
        images = images.into_iter().flat_map(with).collect();
    }
    for (at, found) in meta.iter().enumerate() {
        let with = |image: LegImage| {
            found.iter().map(move |page| {
                let mut image = image;
                image.meta[at] = *page;
                image
            })
        };
        images = images.into_iter().flat_map(with).collect();
    }
    images
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_leg_is_found_in_every_combination_of_what_its_places_may_hold() {
        let meta = [vec![0], vec![1, 2, 3], vec![4], vec![5], vec![6], vec![7, 8]];
        let images = leg_images(&[0b0000_0011, 0b0001_0101], &meta);
        let different: std::collections::HashSet<&LegImage> = images.iter().collect();
        assert_eq!((images.len(), different.len()), (2 * 3 * 3 * 2, images.len()));
        assert!(images.contains(&LegImage { blocks: [1, 4], meta: [0, 2, 4, 5, 6, 8] }));
        let gone: [Vec<PageId>; PAGES] = Default::default();
        assert!(leg_images(&[1, 1], &gone).is_empty(), "no leg is there");
    }
}

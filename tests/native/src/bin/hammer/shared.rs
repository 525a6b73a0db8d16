//! The range that everybody writes and reads.

use lockstep_native::history::{BLOCK, History, fill, value};

use crate::{Aligned, Device};

/// Across the border of two regions.
const FIRST: u64 = (16 << 20) / BLOCK as u64 - 192;
const COUNT: usize = 384;
const LONGEST: usize = 32;

pub(crate) struct Shared {
    history: History,
}

fn values(first: u64, bytes: &[u8]) -> Result<Vec<u64>, String> {
    bytes.chunks_exact(BLOCK).enumerate().map(|(place, bytes)| value(first + place as u64, bytes)).collect()
}

impl Shared {
    /// As it is found: an earlier run's, or zeroes.
    pub(crate) fn found(device: &Device) -> Result<Self, String> {
        let mut memory = Aligned::new(COUNT);
        while !device.read(FIRST, memory.blocks(COUNT))? {}
        Ok(Self { history: History::new(&values(FIRST, memory.blocks(COUNT))?) })
    }

    pub(crate) fn written(&self) -> u64 {
        self.history.answered() - COUNT as u64
    }

    fn read(&self, device: &Device, memory: &mut Aligned, place: usize, count: usize) -> Result<bool, String> {
        let (bytes, block) = (memory.blocks(count), FIRST + place as u64);
        let begin = self.history.now();
        if !device.read(block, bytes)? {
            return Ok(false);
        }
        let end = self.history.now();
        for (number, value) in values(block, bytes)?.into_iter().enumerate() {
            self.history.read(place + number, value, begin, end)?;
        }
        Ok(true)
    }

    fn write(&self, device: &Device, memory: &mut Aligned, place: usize, count: usize) -> Result<(), String> {
        let (bytes, block) = (memory.blocks(count), FIRST + place as u64);
        let value = device.new_value();
        for (number, bytes) in bytes.chunks_exact_mut(BLOCK).enumerate() {
            fill(block + number as u64, value, bytes);
        }
        let begin = self.history.now();
        (place..place + count).for_each(|place| self.history.writes(place, value, begin));
        if device.write(block, bytes)? {
            let end = self.history.now();
            (place..place + count).for_each(|place| self.history.wrote(place, value, end));
        }
        Ok(())
    }

    /// One thread: every third only reads, and every write may be followed by a flush.
    pub(crate) fn run(&self, device: &Device, number: usize, mut random: fastrand::Rng) -> Result<(), String> {
        let mut memory = Aligned::new(LONGEST);
        while device.goes_on() {
            let count = if random.bool() { 1 } else { random.usize(1..=LONGEST) };
            // Half of all meet in a few blocks.
            let room = if random.bool() { LONGEST * 2 } else { COUNT };
            let place = (COUNT - room) / 2 + random.usize(0..=room - count);
            if number % 3 == 2 || random.u8(0..5) == 0 {
                self.read(device, &mut memory, place, count)?;
            } else {
                self.write(device, &mut memory, place, count)?;
                if random.u8(0..24) == 0 {
                    device.flush()?;
                }
            }
        }
        Ok(())
    }

    /// Reads all of it once more, and judges everything.
    pub(crate) fn finally(&self, device: &Device) -> Result<(), String> {
        let mut memory = Aligned::new(LONGEST);
        for place in (0..COUNT).step_by(LONGEST) {
            while !self.read(device, &mut memory, place, LONGEST)? {}
        }
        self.history.check()
    }
}

//! A range that one thread has for itself: it knows what must be there.

use lockstep_native::history::{BLOCK, fill, value};

use crate::{Aligned, Device};

const FIRST: u64 = (32 << 20) / BLOCK as u64;
const COUNT: usize = 256;
const LONGEST: usize = 64;

fn verify(device: &Device, memory: &mut Aligned, first: u64, expected: &[Vec<u64>], place: usize, count: usize) -> Result<(), String> {
    let bytes = memory.blocks(count);
    if !device.read(first + place as u64, bytes)? {
        return Ok(());
    }
    for (number, bytes) in bytes.chunks_exact(BLOCK).enumerate() {
        let (block, expected) = (first + (place + number) as u64, &expected[place + number]);
        let found = value(block, bytes)?;
        if !expected.contains(&found) {
            return Err(format!("block {block}: {found:#x} was read where only {expected:#x?} can be"));
        }
    }
    Ok(())
}

/// Writes, zeroes, flushes and verifies until it is time, and then verifies all.
pub(crate) fn run(device: &Device, number: u64, mut random: fastrand::Rng) -> Result<(), String> {
    let first = FIRST + number * COUNT as u64;
    let mut memory = Aligned::new(LONGEST);
    // By block: what can be there. More than one value after a failure only.
    let mut expected = vec![vec![0]; COUNT];
    while !device.zero(first, COUNT as u64)? {}
    while device.goes_on() {
        let count = random.usize(1..=LONGEST);
        let place = random.usize(0..=COUNT - count);
        let block = first + place as u64;
        let (value, done) = match random.u8(0..16) {
            0..7 => {
                let value = device.new_value();
                for (number, bytes) in memory.blocks(count).chunks_exact_mut(BLOCK).enumerate() {
                    fill(block + number as u64, value, bytes);
                }
                (value, device.write(block, memory.blocks(count))?)
            }
            7..9 => (0, device.zero(block, count as u64)?),
            9 => {
                device.flush()?;
                continue;
            }
            _ => {
                verify(device, &mut memory, first, &expected, place, count)?;
                continue;
            }
        };
        for expected in &mut expected[place..place + count] {
            if done {
                expected.clear();
            }
            expected.push(value);
        }
    }
    (0..COUNT).step_by(LONGEST).try_for_each(|place| verify(device, &mut memory, first, &expected, place, LONGEST))
}

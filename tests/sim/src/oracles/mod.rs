//! What must hold, whatever the simulator does. The oracles know what was asked and answered and what the disks hold; they do not know
//! the core, and nothing of how the simulator chose.
//!
//! | | |
//! |---|---|
//! | `history` | what reads may return; what must survive (mirror rules 4, 7, 15, 16, 21) |
//! | `legs` | what the disks must hold when something is answered or cleared, and when all is quiet (8, 16, 18) |
//! | `bounds` | how much may be under way (5, 6, 32) |

pub mod bounds;
pub mod history;
pub mod legs;

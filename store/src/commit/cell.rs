//! A value of several words with one writer, replaced as a whole.
//!
//! ```text
//!   selector = n                 the value is in slot n mod 2
//!   write:  fill slot (n+1) mod 2, then publish selector = n+1
//! ```
//! Death before the publication leaves the old value, with scraps of the new one in the slot that nobody reads.

use super::Memory;
use ramtorch_failpoint::{Point, hit};

/// Where the selector and the two slots lie, in words.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Cell<const WORDS: usize> {
    pub selector: usize,
    pub slots: [usize; 2],
}

impl<const WORDS: usize> Cell<WORDS> {
    /// Replaces the value. One writer at a time.
    pub fn write(&self, memory: &impl Memory, value: &[u64; WORDS]) {
        hit(Point::StepRecordBegun);
        let next = memory.load(self.selector).wrapping_add(1);
        // A reader that is still copying this slot, from the time when it was the live one, must notice.
        memory.order_writes();
        let slot = self.slots[(next & 1) as usize];
        for (i, word) in value.iter().enumerate() {
            memory.write(slot + i, *word);
        }
        hit(Point::StepRecordFilled);
        memory.publish(self.selector, next);
        hit(Point::StepRecordPublished);
    }

    /// The value. Tried again for as long as a writer replaces it twice during one copy.
    pub fn read(&self, memory: &impl Memory) -> [u64; WORDS] {
        loop {
            let selector = memory.load(self.selector);
            let slot = self.slots[(selector & 1) as usize];
            let value = std::array::from_fn(|i| memory.read(slot + i));
            memory.order_reads();
            if memory.read(self.selector) == selector {
                return value;
            }
            std::hint::spin_loop();
        }
    }
}

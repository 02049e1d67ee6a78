//! Which tensors go into which shard.

/// Divide tensors of the given sizes over `shards` shards as evenly as whole tensors allow: the largest first, each to the
/// shard that has least. Returns the shard of each tensor. The same input gives the same division on every rank.
///
/// No shard gets more than the mean plus the largest tensor.
pub fn partition(bytes: &[u64], shards: u32) -> Vec<u32> {
    let mut order: Vec<usize> = (0..bytes.len()).collect();
    order.sort_by_key(|&i| (std::cmp::Reverse(bytes[i]), i));
    let mut heap: std::collections::BinaryHeap<_> = (0..shards.max(1)).map(|shard| std::cmp::Reverse((0u128, shard))).collect();
    let mut owner = vec![0; bytes.len()];
    for i in order {
        if let Some(mut least) = heap.peek_mut() {
            owner[i] = least.0.1;
            least.0.0 += u128::from(bytes[i]);
        }
    }
    owner
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_tensor_has_one_shard_and_loads_are_even(bytes in proptest::collection::vec(0u64..1 << 40, 0..200), shards in 1u32..40) {
            let owner = partition(&bytes, shards);
            prop_assert_eq!(owner.len(), bytes.len());
            prop_assert!(owner.iter().all(|&s| s < shards));
            let mut load = vec![0u64; shards as usize];
            for (&shard, &size) in owner.iter().zip(&bytes) {
                load[shard as usize] += size;
            }
            let mean = bytes.iter().sum::<u64>() / u64::from(shards);
            let largest = bytes.iter().copied().max().unwrap_or(0);
            prop_assert!(load.iter().all(|&l| l <= mean + largest), "{load:?}");
            prop_assert_eq!(partition(&bytes, shards), owner);
        }
    }

    #[test]
    fn sizes_near_the_limit_do_not_overflow() {
        assert_eq!(partition(&[u64::MAX, u64::MAX, u64::MAX], 2), [0, 1, 0]);
    }
}

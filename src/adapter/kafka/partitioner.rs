//! Which partition a key belongs to: the same one that Kafka's own clients
//! choose. Pure.

use crate::broker::OrderKey;

/// Whose partition a key gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Partitioner {
    /// librdkafka's `consistent`: CRC32.
    Crc32,
    /// Java's default: murmur2.
    Murmur2,
}

impl Partitioner {
    /// The partition, out of `count` (at least one). An explicit partition is
    /// given back as it is, also where it does not exist.
    pub(super) fn partition(self, order: &OrderKey, explicit: Option<i32>, count: i32) -> i32 {
        if let Some(partition) = explicit {
            return partition;
        }
        let count = u32::try_from(count).unwrap_or(1).max(1);
        let hash = match (self, order) {
            (Self::Crc32, OrderKey::Key(key)) => crc32fast::hash(key.as_bytes()),
            // Java drops the sign bit, it does not take the absolute value.
            (Self::Murmur2, OrderKey::Key(key)) => murmur2(key.as_bytes()) & 0x7fff_ffff,
            (_, OrderKey::Publisher(number)) => spread(*number),
        };
        i32::try_from(hash % count).unwrap_or(0)
    }
}

/// Publisher numbers count up; spread them so that neighbours part (the
/// finaliser of SplitMix64).
fn spread(number: u64) -> u32 {
    let mut z = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    (z >> 32) as u32
}

/// murmur2 with the seed of Kafka's Java client.
fn murmur2(data: &[u8]) -> u32 {
    const SEED: u32 = 0x9747_b28c;
    const M: u32 = 0x5bd1_e995;
    const R: u32 = 24;
    let mut h = SEED ^ (data.len() as u32);
    let mut chunks = data.chunks_exact(4);
    for chunk in &mut chunks {
        let mut k = chunk
            .iter()
            .rev()
            .fold(0u32, |k, byte| (k << 8) | u32::from(*byte));
        k = k.wrapping_mul(M);
        k ^= k >> R;
        k = k.wrapping_mul(M);
        h = h.wrapping_mul(M) ^ k;
    }
    let rest = chunks.remainder();
    if !rest.is_empty() {
        for (i, byte) in rest.iter().enumerate() {
            h ^= u32::from(*byte) << (8 * i);
        }
        h = h.wrapping_mul(M);
    }
    h ^= h >> 13;
    h = h.wrapping_mul(M);
    h ^ (h >> 15)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn murmur2_is_that_of_kafkas_java_client() {
        // The vectors of org.apache.kafka.common.utils.UtilsTest.
        for (text, hash) in [
            ("21", -973_932_308),
            ("foobar", -790_332_482),
            ("a-little-bit-long-string", -985_981_536),
            ("a-little-bit-longer-string", -1_486_304_829),
            (
                "lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8",
                -58_897_971,
            ),
            ("abc", 479_470_107),
        ] {
            assert_eq!(murmur2(text.as_bytes()) as i32, hash, "{text}");
        }
    }

    #[test]
    fn crc32_is_that_of_librdkafka() {
        assert_eq!(crc32fast::hash(b"123456789"), 0xcbf4_3926);
        let key = OrderKey::Key("123456789".into());
        assert_eq!(
            Partitioner::Crc32.partition(&key, None, 6),
            (0xcbf4_3926_u32 % 6) as i32
        );
    }

    #[test]
    fn neighbouring_publishers_spread_over_the_partitions() {
        let mut seen = [0; 6];
        for number in 0..600 {
            let p = Partitioner::Crc32.partition(&OrderKey::Publisher(number), None, 6);
            seen[p as usize] += 1;
        }
        assert!(seen.iter().all(|n| *n > 50), "{seen:?}");
    }
}

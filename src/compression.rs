//! Payloads that the hub makes smaller on their way through a broker that does
//! not do so itself (RabbitMQ, the embedded broker), and restores for its readers.
//!
//! ```text
//!   publish --> compress --> broker --> expand --> reader of a hub
//!                               `-----> any other reader: content_encoding says how
//! ```
//!
//! What is compressed carries `content_encoding` and the header `hub-compressed`
//! of the same value. A message with a `content_encoding` of its own is left alone
//! on both ways. It refuses to expand beyond a limit, whatever a message claims of
//! itself. Pure; the formats are those of RFC 8878 (zstd), the LZ4 frame, and
//! RFC 1952 (gzip).

use bytes::Bytes;

use crate::{
    broker::Compression,
    message::{Message, wire::names::COMPRESSED},
};

/// Why a message cannot be expanded, as the reason of its dead letter.
pub(crate) const UNDECODABLE: &str = "undecodable";

/// Why the hub cannot compress so, if it cannot.
pub(crate) fn unusable(algorithm: Compression) -> Option<&'static str> {
    match algorithm {
        Compression::None => None,
        Compression::Snappy => Some(
            "snappy is Kafka's alone, other brokers' readers would not know it; use zstd, lz4 or gzip",
        ),
        Compression::Gzip | Compression::Lz4 | Compression::Zstd => {
            (!cfg!(feature = "compression")).then_some(
                "this build cannot compress; build with the feature compression, or leave it out",
            )
        }
    }
}

/// The payload compressed, where that makes the message smaller.
pub(crate) fn smaller(payload: &Bytes, algorithm: Compression) -> Option<Bytes> {
    let packed = codec::pack(payload, algorithm)?;
    (packed.len().saturating_add(MARKS) < payload.len()).then(|| packed.into())
}

/// Puts a compressed payload in the place of its own.
pub(crate) fn mark(message: &mut Message, algorithm: Compression, payload: Bytes) {
    let name = name(algorithm);
    message.payload = payload;
    message.content_encoding = Some(name.to_owned());
    message
        .headers
        .insert(COMPRESSED.to_owned(), name.to_owned());
}

/// Whether a hub compressed it.
pub(crate) fn is_marked(message: &Message) -> bool {
    message.content_encoding.is_some()
        && message.headers.get(COMPRESSED) == message.content_encoding.as_ref()
}

/// A marked message as it was before; `None` where this build knows nothing of
/// its format, so that it goes on as it stands.
///
/// # Errors
/// Why it cannot be: it is damaged, or would have more than `most` bytes.
pub(crate) fn expand(message: &Message, most: usize) -> Result<Option<Message>, String> {
    let encoding = message.content_encoding.as_deref().unwrap_or_default();
    let Some(payload) = codec::unpack(&message.payload, encoding, most) else {
        return Ok(None);
    };
    let mut whole = message.clone();
    whole.payload = payload?.into();
    whole.content_encoding = None;
    whole.headers.remove(COMPRESSED);
    Ok(Some(whole))
}

/// What `content_encoding` says.
const fn name(algorithm: Compression) -> &'static str {
    match algorithm {
        Compression::None => "identity",
        Compression::Gzip => "gzip",
        Compression::Snappy => "snappy",
        Compression::Lz4 => "lz4",
        Compression::Zstd => "zstd",
    }
}

/// About what the encoding and the header add to a message, in bytes.
const MARKS: usize = 48;

#[cfg(not(feature = "compression"))]
mod codec {
    use crate::broker::Compression;

    pub(super) fn pack(_: &[u8], _: Compression) -> Option<Vec<u8>> {
        None
    }

    pub(super) fn unpack(_: &[u8], _: &str, _: usize) -> Option<Result<Vec<u8>, String>> {
        None
    }
}

#[cfg(feature = "compression")]
mod codec {
    use std::io::{Read, Write};

    use crate::broker::Compression;

    /// `None` where there is nothing to do, or the format failed: then the
    /// message goes as it is.
    pub(super) fn pack(payload: &[u8], algorithm: Compression) -> Option<Vec<u8>> {
        // What would not fit into this is of no use.
        let room = payload.len();
        match algorithm {
            Compression::None | Compression::Snappy => None,
            Compression::Zstd => {
                let mut packed = vec![0; room];
                let used = zstd_safe::compress(&mut packed[..], payload, ZSTD_LEVEL).ok()?;
                packed.truncate(used);
                packed.shrink_to_fit();
                Some(packed)
            }
            Compression::Lz4 => {
                let mut encoder = lz4_flex::frame::FrameEncoder::new(Vec::new());
                encoder.write_all(payload).ok()?;
                encoder.finish().ok()
            }
            Compression::Gzip => {
                let level = flate2::Compression::default();
                let mut encoder = flate2::write::GzEncoder::new(Vec::new(), level);
                encoder.write_all(payload).ok()?;
                encoder.finish().ok()
            }
        }
    }

    /// `None` for a format that is not ours.
    pub(super) fn unpack(
        packed: &[u8],
        encoding: &str,
        most: usize,
    ) -> Option<Result<Vec<u8>, String>> {
        Some(match encoding {
            "zstd" => zstd(packed, most),
            "lz4" => read(lz4_flex::frame::FrameDecoder::new(packed), "lz4", most),
            "gzip" => read(flate2::read::GzDecoder::new(packed), "gzip", most),
            _ => return None,
        })
    }

    /// In one step, into a buffer of the size that the frame claims, if that is
    /// allowed: a frame that lies finds no room.
    fn zstd(packed: &[u8], most: usize) -> Result<Vec<u8>, String> {
        let damaged = |why: &str| format!("the zstd payload is damaged: {why}");
        let claimed = zstd_safe::get_frame_content_size(packed)
            .map_err(|_| damaged("it has no frame"))?
            .ok_or_else(|| damaged("its frame does not say its size"))?;
        let size = usize::try_from(claimed).unwrap_or(usize::MAX);
        if size > most {
            return Err(too_large(most));
        }
        let mut whole = vec![0; size];
        let used = zstd_safe::decompress(&mut whole[..], packed)
            .map_err(|code| damaged(zstd_safe::get_error_name(code)))?;
        if used != size {
            return Err(damaged("it has another size than its frame says"));
        }
        Ok(whole)
    }

    fn read(decoder: impl Read, format: &str, most: usize) -> Result<Vec<u8>, String> {
        let mut whole = Vec::new();
        // One more than allowed tells too large from just fitting.
        let limit = u64::try_from(most).unwrap_or(u64::MAX).saturating_add(1);
        decoder
            .take(limit)
            .read_to_end(&mut whole)
            .map_err(|e| format!("the {format} payload is damaged: {e}"))?;
        if whole.len() > most {
            return Err(too_large(most));
        }
        Ok(whole)
    }

    fn too_large(most: usize) -> String {
        format!("the payload has more than {most} bytes (max_message_bytes) when it is expanded")
    }

    /// zstd's own default: a gigabyte takes about three seconds.
    const ZSTD_LEVEL: i32 = 3;
}

#[cfg(feature = "compression")]
#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ALL: [Compression; 3] = [Compression::Zstd, Compression::Lz4, Compression::Gzip];
    const MOST: usize = 1 << 20;

    fn packed(payload: &Bytes, algorithm: Compression) -> Message {
        let mut message = Message::new("t", payload.clone()).with_header("h", "v");
        let smaller = smaller(payload, algorithm).expect("it gets smaller");
        mark(&mut message, algorithm, smaller);
        message
    }

    proptest! {
        /// Whatever is compressed is smaller, and comes back as it was.
        #[test]
        fn what_is_compressed_is_smaller_and_comes_back_as_it_was(
            word in prop::collection::vec(any::<u8>(), 1..40),
            times in 1..400_usize,
            tail in prop::collection::vec(any::<u8>(), 0..300),
        ) {
            let mut payload = word.repeat(times);
            payload.extend(tail);
            let payload = Bytes::from(payload);
            let plain = Message::new("t", payload.clone()).with_header("h", "v").with_key("k");
            for algorithm in ALL {
                let Some(less) = smaller(&payload, algorithm) else { continue };
                prop_assert!(less.len() < payload.len());
                let mut message = plain.clone();
                mark(&mut message, algorithm, less);
                prop_assert!(is_marked(&message));
                prop_assert_eq!(message.content_encoding.as_deref(), Some(name(algorithm)));
                let back = expand(&message, payload.len()).unwrap().unwrap();
                prop_assert_eq!(&back, &plain);
                prop_assert!(expand(&message, payload.len() - 1).is_err());
            }
        }

        /// Bytes of anybody's making are refused or expanded within the limit.
        #[test]
        fn damage_is_an_error_and_never_more_than_the_limit(
            noise in prop::collection::vec(any::<u8>(), 0..200),
            at in any::<prop::sample::Index>(),
            flip in 1..=255_u8,
        ) {
            let payload = Bytes::from(b"all work and no play ".repeat(200));
            for algorithm in ALL {
                let mut message = packed(&payload, algorithm);
                let mut bytes = message.payload.to_vec();
                let at = at.index(bytes.len());
                bytes[at] ^= flip;
                message.payload = bytes.into();
                if let Ok(Some(whole)) = expand(&message, MOST) {
                    prop_assert!(whole.payload.len() <= MOST);
                }
                message.payload = noise.clone().into();
                if let Ok(Some(whole)) = expand(&message, 100) {
                    prop_assert!(whole.payload.len() <= 100);
                }
            }
        }
    }

    #[test]
    fn a_bomb_is_refused_by_every_format() {
        let bomb = Bytes::from(vec![0; 64 << 20]);
        for algorithm in ALL {
            let message = packed(&bomb, algorithm);
            assert!(message.payload.len() < 1 << 20, "{algorithm:?}");
            let why = expand(&message, MOST).unwrap_err();
            assert!(why.contains("more than 1048576 bytes"), "{why}");
        }
    }

    #[test]
    fn a_zstd_frame_that_lies_about_its_size_finds_no_room() {
        let mut message = packed(&Bytes::from(vec![7; 100_000]), Compression::Zstd);
        let mut bytes = message.payload.to_vec();
        // Frame header: magic (4), descriptor, then a content size of 4 bytes.
        assert_eq!(
            bytes[4] & 0b1110_0000,
            0b1010_0000,
            "single segment, 4 bytes"
        );
        bytes[5..9].copy_from_slice(&1000_u32.to_le_bytes());
        message.payload = bytes.into();
        assert!(expand(&message, MOST).is_err());
    }

    #[test]
    fn what_does_not_get_smaller_or_is_not_ours_is_left_alone() {
        let noise: Bytes = (0..5_000).map(|_| fastrand::u8(..)).collect();
        for algorithm in ALL {
            assert!(smaller(&noise, algorithm).is_none(), "{algorithm:?}");
            assert!(unusable(algorithm).is_none());
        }
        assert!(unusable(Compression::Snappy).is_some());
        let own = Message::new("t", "x").with_content_encoding("gzip");
        assert!(!is_marked(&own));
        let mut other = own.clone();
        other
            .headers
            .insert(COMPRESSED.to_owned(), "zstd".to_owned());
        assert!(!is_marked(&other), "somebody encoded it again");
        let mut unknown = own;
        unknown.content_encoding = Some("br".to_owned());
        unknown
            .headers
            .insert(COMPRESSED.to_owned(), "br".to_owned());
        assert_eq!(expand(&unknown, MOST), Ok(None));
    }
}

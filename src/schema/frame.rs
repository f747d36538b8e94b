//! The registry's wire format: a zero byte, the schema's id as four bytes, big end
//! first, the payload. Pure.

use bytes::{BufMut, Bytes, BytesMut};

/// Bytes before the payload.
const HEADER: usize = 5;

/// Puts a schema's id before a payload.
#[must_use]
pub fn frame(id: u32, payload: &[u8]) -> Bytes {
    let mut out = BytesMut::with_capacity(HEADER + payload.len());
    out.put_u8(0);
    out.put_u32(id);
    out.put_slice(payload);
    out.freeze()
}

/// The schema's id and the payload; none when it is not in the wire format.
#[must_use]
pub fn unframe(framed: &[u8]) -> Option<(u32, &[u8])> {
    let (header, payload) = framed.split_first_chunk::<HEADER>()?;
    let [0, id @ ..] = header else { return None };
    Some((u32::from_be_bytes(*id), payload))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_framed_comes_out_again_and_other_things_do_not() {
        let framed = frame(0x0102_0304, b"x");
        assert_eq!(framed[..], [0, 1, 2, 3, 4, b'x']);
        assert_eq!(unframe(&framed), Some((0x0102_0304, &b"x"[..])));
        assert_eq!(unframe(&frame(0, b"")), Some((0, &b""[..])));
        for other in [&b""[..], b"\0\0\0\0", b"{\"a\":1}", b"\x01\0\0\0\0"] {
            assert_eq!(unframe(other), None);
        }
    }
}

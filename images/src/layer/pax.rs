//! PAX records: `LENGTH KEY=VALUE\n`, where the length counts itself.
//!
//! They carry what a header's fields cannot: long names, large numbers, nanoseconds, attributes.
//! Values are any bytes; lengths make newlines harmless. Records are written in the order of their
//! keys, so that equal entries have equal bytes.

use std::collections::BTreeMap;

use crate::meta::Time;

/// The records before one entry.
pub(super) type Records = BTreeMap<Vec<u8>, Vec<u8>>;

/// The bytes of all records.
pub(super) fn encode(records: &Records) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (key, value) in records {
        let length = record_length(key.len() + value.len() + 3);
        bytes.extend_from_slice(length.to_string().as_bytes());
        bytes.push(b' ');
        bytes.extend_from_slice(key);
        bytes.push(b'=');
        bytes.extend_from_slice(value);
        bytes.push(b'\n');
    }
    bytes
}

/// The length with its own digits, given that of the rest.
fn record_length(rest: usize) -> usize {
    let mut length = rest + digits(rest);
    if rest + digits(length) != length {
        length = rest + digits(length);
    }
    length
}

fn digits(number: usize) -> usize {
    number.to_string().len()
}

/// Reads records; `None` if they are damaged. Of equal keys the last counts, an empty value deletes.
pub(super) fn parse(mut bytes: &[u8]) -> Option<Records> {
    let mut records = Records::new();
    while !bytes.is_empty() {
        let space = bytes.iter().take(20).position(|&byte| byte == b' ')?;
        let length = decimal(&bytes[..space])?;
        let record = bytes.get(space + 1..usize::try_from(length).ok()?)?;
        let (newline, record) = record.split_last()?;
        let equals = record.iter().position(|&byte| byte == b'=')?;
        if *newline != b'\n' || equals == 0 {
            return None;
        }
        records.insert(record[..equals].to_vec(), record[equals + 1..].to_vec());
        bytes = &bytes[length as usize..];
    }
    Some(records)
}

/// A number in decimal digits alone.
pub(super) fn decimal(digits: &[u8]) -> Option<u64> {
    if digits.is_empty() || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(digits).ok()?.parse().ok()
}

/// Seconds with as many decimals as needed; before 1970 with a sign that counts for both.
pub(super) fn format_time(time: Time) -> String {
    let total = i128::from(time.secs) * 1_000_000_000 + i128::from(time.nanos);
    let sign = if total < 0 { "-" } else { "" };
    let (secs, nanos) = (total.unsigned_abs() / 1_000_000_000, total.unsigned_abs() % 1_000_000_000);
    match nanos {
        0 => format!("{sign}{secs}"),
        _ => format!("{sign}{secs}.{nanos:09}").trim_end_matches('0').to_owned(),
    }
}

/// Reads what [`format_time`] writes; further decimals are cut off.
pub(super) fn parse_time(text: &[u8]) -> Option<Time> {
    let (negative, text) = text.strip_prefix(b"-").map_or((false, text), |rest| (true, rest));
    let dot = text.iter().position(|&byte| byte == b'.').unwrap_or(text.len());
    let secs = i128::from(decimal(&text[..dot])?);
    let decimals = text.get(dot + 1..).unwrap_or_default();
    let nanos = if decimals.is_empty() { 0 } else { parse_nanos(decimals)? };
    let total = secs * 1_000_000_000 + i128::from(nanos);
    let total = if negative { -total } else { total };
    Some(Time {
        secs: total.div_euclid(1_000_000_000).try_into().ok()?,
        nanos: total.rem_euclid(1_000_000_000) as u32,
    })
}

fn parse_nanos(decimals: &[u8]) -> Option<u32> {
    if !decimals.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let padded = decimals.iter().chain(std::iter::repeat(&b'0')).take(9);
    Some(padded.fold(0, |value, &digit| value * 10 + u32::from(digit - b'0')))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_length_counts_its_own_digits() {
        for (value, expected) in [(4, "9 k=vvvv\n"), (5, "11 k=vvvvv\n"), (6, "12 k=vvvvvv\n")] {
            let records = Records::from([(b"k".to_vec(), vec![b'v'; value])]);
            let bytes = encode(&records);
            assert_eq!(String::from_utf8_lossy(&bytes), expected);
            assert_eq!(parse(&bytes), Some(records));
        }
    }

    #[test]
    fn times_before_1970_have_one_sign_for_both_parts() {
        let half_before = Time { secs: -1, nanos: 500_000_000 };
        assert_eq!(format_time(half_before), "-0.5");
        assert_eq!(parse_time(b"-0.5"), Some(half_before));
        assert_eq!(parse_time(b"1.0000000019"), Some(Time { secs: 1, nanos: 1 }));
        for bad in [b"".as_slice(), b"-", b"1.x", b"+1", b"99999999999999999999"] {
            assert_eq!(parse_time(bad), None, "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn records_are_read_back(records in proptest::collection::btree_map(
            "[a-z.]{1,30}".prop_map(String::into_bytes), proptest::collection::vec(any::<u8>(), 0..1100), 0..5)) {
            prop_assert_eq!(parse(&encode(&records)), Some(records));
        }

        #[test]
        fn times_are_read_back(secs in any::<i64>(), nanos in 0u32..1_000_000_000) {
            let time = Time { secs, nanos };
            prop_assert_eq!(parse_time(format_time(time).as_bytes()), Some(time));
        }

        #[test]
        fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = (parse(&bytes), parse_time(&bytes));
        }
    }
}

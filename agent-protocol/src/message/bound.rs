//! The bounds of single fields, kept where the fields are read, so that
//! everything behind the decoder can rely on them.
//!
//! Texts that only people read are cut to their bound when they are written:
//! a long error message must not make a message that the other end refuses.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::marker::PhantomData;

use serde::de::{Error as _, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serializer};

use super::command::CommandStatus;
use crate::ids::StreamId;

/// Longest name of a figure, in characters.
const FIGURE_NAME_MAX: usize = 64;

// ---- offsets ------------------------------------------------------------

/// An offset in a stream: a whole number up to 2^63 - 1.
pub(super) fn offset<'de, D: Deserializer<'de>>(from: D) -> Result<u64, D::Error> {
    let offset = u64::deserialize(from)?;
    if i64::try_from(offset).is_err() {
        return Err(D::Error::custom("must not pass 2^63 - 1"));
    }
    Ok(offset)
}

#[derive(Deserialize)]
#[serde(transparent)]
struct Offset(#[serde(deserialize_with = "offset")] u64);

/// Offsets by stream, at most `MAX`.
pub(super) fn positions<'de, const MAX: usize, D: Deserializer<'de>>(
    from: D,
) -> Result<BTreeMap<StreamId, u64>, D::Error> {
    let positions: BTreeMap<StreamId, Offset> = map::<MAX, _, _, _>(from)?;
    Ok(positions.into_iter().map(|(stream, Offset(offset))| (stream, offset)).collect())
}

// ---- lists and maps -----------------------------------------------------

/// A list of at most `MAX` elements.
pub(super) fn list<'de, const MAX: usize, T: Deserialize<'de>, D: Deserializer<'de>>(
    from: D,
) -> Result<Vec<T>, D::Error> {
    struct List<const MAX: usize, T>(PhantomData<T>);
    impl<'de, const MAX: usize, T: Deserialize<'de>> Visitor<'de> for List<MAX, T> {
        type Value = Vec<T>;
        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a sequence")
        }
        fn visit_seq<A: SeqAccess<'de>>(self, mut from: A) -> Result<Vec<T>, A::Error> {
            let mut list = Vec::new();
            while let Some(element) = from.next_element()? {
                if list.len() == MAX {
                    return Err(A::Error::custom(format_args!("has at most {MAX} elements")));
                }
                list.push(element);
            }
            Ok(list)
        }
    }
    from.deserialize_seq(List::<MAX, T>(PhantomData))
}

/// A map of at most `MAX` entries, no key twice: of two values for one key,
/// two implementations would believe different ones.
pub(super) fn map<'de, const MAX: usize, K, V, D>(from: D) -> Result<BTreeMap<K, V>, D::Error>
where
    K: Deserialize<'de> + Ord,
    V: Deserialize<'de>,
    D: Deserializer<'de>,
{
    struct Map<const MAX: usize, K, V>(PhantomData<(K, V)>);
    impl<'de, const MAX: usize, K, V> Visitor<'de> for Map<MAX, K, V>
    where
        K: Deserialize<'de> + Ord,
        V: Deserialize<'de>,
    {
        type Value = BTreeMap<K, V>;
        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a map")
        }
        fn visit_map<A: MapAccess<'de>>(self, mut from: A) -> Result<Self::Value, A::Error> {
            let mut map = BTreeMap::new();
            while let Some((key, value)) = from.next_entry()? {
                if map.len() == MAX {
                    return Err(A::Error::custom(format_args!("has at most {MAX} entries")));
                }
                if map.insert(key, value).is_some() {
                    return Err(A::Error::custom("must not have a key twice"));
                }
            }
            Ok(map)
        }
    }
    from.deserialize_map(Map::<MAX, K, V>(PhantomData))
}

/// Environment variables that every system can set.
pub(super) fn env<'de, const MAX: usize, D: Deserializer<'de>>(
    from: D,
) -> Result<BTreeMap<String, String>, D::Error> {
    let env: BTreeMap<String, String> = map::<MAX, _, _, _>(from)?;
    for (name, value) in &env {
        if name.is_empty() || name.contains(['=', '\0']) {
            return Err(D::Error::custom("a name must not be empty or contain = or NUL"));
        }
        if value.contains('\0') {
            return Err(D::Error::custom("a value must not contain NUL"));
        }
    }
    Ok(env)
}

/// A directory that every system can name.
pub(super) fn cwd<'de, D: Deserializer<'de>>(from: D) -> Result<Option<String>, D::Error> {
    let cwd: Option<String> = Option::deserialize(from)?;
    if cwd.as_ref().is_some_and(|cwd| cwd.is_empty() || cwd.contains('\0')) {
        return Err(D::Error::custom("must not be empty or contain NUL"));
    }
    Ok(cwd)
}

// ---- texts for people ---------------------------------------------------

/// A text of at most `MAX` characters.
pub(super) fn text<'de, const MAX: usize, D: Deserializer<'de>>(
    from: D,
) -> Result<Option<String>, D::Error> {
    let text: Option<String> = Option::deserialize(from)?;
    if let Some(text) = &text {
        check_length::<MAX, _>(text)?;
    }
    Ok(text)
}

/// Writes a text, cut to `MAX` characters.
#[expect(clippy::ref_option, reason = "serde hands the field over as it is")]
pub(super) fn cut_text<const MAX: usize, S: Serializer>(
    text: &Option<String>,
    to: S,
) -> Result<S::Ok, S::Error> {
    to.serialize_some(cut::<MAX>(text.as_deref().unwrap_or_default()))
}

/// One line of at most `MAX` characters, without control characters.
pub(super) fn line<'de, const MAX: usize, D: Deserializer<'de>>(
    from: D,
) -> Result<Option<String>, D::Error> {
    let line: Option<String> = Option::deserialize(from)?;
    if let Some(line) = &line {
        check_line::<MAX, _>(line)?;
    }
    Ok(line)
}

/// Writes one line, cut to `MAX` characters, control characters replaced.
#[expect(clippy::ref_option, reason = "serde hands the field over as it is")]
pub(super) fn cut_line<const MAX: usize, S: Serializer>(
    line: &Option<String>,
    to: S,
) -> Result<S::Ok, S::Error> {
    to.serialize_some(&one_line::<MAX>(line.as_deref().unwrap_or_default()))
}

/// At most `LINES` lines of at most `MAX` characters each.
pub(super) fn lines<'de, const LINES: usize, const MAX: usize, D: Deserializer<'de>>(
    from: D,
) -> Result<Vec<String>, D::Error> {
    let lines: Vec<String> = list::<LINES, _, _>(from)?;
    for line in &lines {
        check_line::<MAX, _>(line)?;
    }
    Ok(lines)
}

/// Writes lines, cut to their bounds.
pub(super) fn cut_lines<const LINES: usize, const MAX: usize, S: Serializer>(
    lines: &[String],
    to: S,
) -> Result<S::Ok, S::Error> {
    to.collect_seq(lines.iter().take(LINES).map(|line| one_line::<MAX>(line)))
}

fn check_length<const MAX: usize, E: serde::de::Error>(text: &str) -> Result<(), E> {
    if text.chars().nth(MAX).is_some() {
        return Err(E::custom(format_args!("has at most {MAX} characters")));
    }
    Ok(())
}

fn check_line<const MAX: usize, E: serde::de::Error>(line: &str) -> Result<(), E> {
    check_length::<MAX, E>(line)?;
    if line.contains(char::is_control) {
        return Err(E::custom("must not contain control characters"));
    }
    Ok(())
}

fn cut<const MAX: usize>(text: &str) -> &str {
    text.char_indices().nth(MAX).map_or(text, |(end, _)| &text[..end])
}

fn one_line<const MAX: usize>(line: &str) -> Cow<'_, str> {
    let line = cut::<MAX>(line);
    if line.contains(char::is_control) {
        Cow::Owned(line.replace(char::is_control, "\u{b7}"))
    } else {
        Cow::Borrowed(line)
    }
}

// ---- texts of a bounded length in bytes ---------------------------------------

/// A text of at most `MAX` bytes.
pub(super) fn bytes<'de, const MAX: usize, D: Deserializer<'de>>(
    from: D,
) -> Result<String, D::Error> {
    let text = String::deserialize(from)?;
    check_bytes::<MAX, _>(&text)?;
    Ok(text)
}

/// Writes a text, cut to `MAX` bytes where a character ends.
pub(super) fn cut_bytes<const MAX: usize, S: Serializer>(
    text: &str,
    to: S,
) -> Result<S::Ok, S::Error> {
    to.serialize_str(&text[..text.floor_char_boundary(MAX)])
}

/// At most `COUNT` texts of at most `MAX` bytes, by names of at most `NAME`.
pub(super) fn details<
    'de,
    const COUNT: usize,
    const NAME: usize,
    const MAX: usize,
    D: Deserializer<'de>,
>(
    from: D,
) -> Result<BTreeMap<String, String>, D::Error> {
    let details: BTreeMap<String, String> = map::<COUNT, _, _, _>(from)?;
    for (name, value) in &details {
        if name.len() > NAME {
            return Err(D::Error::custom(format_args!("a name has at most {NAME} bytes")));
        }
        check_bytes::<MAX, _>(value)?;
    }
    Ok(details)
}

/// Writes details, those that have a good name, with values cut to `MAX` bytes.
pub(super) fn cut_details<
    const COUNT: usize,
    const NAME: usize,
    const MAX: usize,
    S: Serializer,
>(
    details: &BTreeMap<String, String>,
    to: S,
) -> Result<S::Ok, S::Error> {
    let named = details.iter().filter(|(name, _)| name.len() <= NAME);
    let cut = |value: &'_ String| value.floor_char_boundary(MAX);
    to.collect_map(named.take(COUNT).map(|(name, value)| (name, &value[..cut(value)])))
}

fn check_bytes<const MAX: usize, E: serde::de::Error>(text: &str) -> Result<(), E> {
    if text.len() > MAX {
        return Err(E::custom(format_args!("has at most {MAX} bytes")));
    }
    Ok(())
}

// ---- figures ------------------------------------------------------------

/// Figures by name, at most `MAX`.
pub(super) fn figures<'de, const MAX: usize, D: Deserializer<'de>>(
    from: D,
) -> Result<BTreeMap<String, f64>, D::Error> {
    let figures: BTreeMap<String, f64> = map::<MAX, _, _, _>(from)?;
    let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
    let is_name =
        |name: &String| (1..=FIGURE_NAME_MAX).contains(&name.len()) && name.bytes().all(allowed);
    if figures.keys().all(is_name) {
        Ok(figures)
    } else {
        Err(D::Error::custom("a name has 1 to 64 of the characters A-Z a-z 0-9 . _ -"))
    }
}

/// Writes figures; JSON has no word for one that is not finite.
pub(super) fn finite_figures<S: Serializer>(
    figures: &BTreeMap<String, f64>,
    to: S,
) -> Result<S::Ok, S::Error> {
    to.collect_map(figures.iter().filter(|(_, figure)| figure.is_finite()))
}

// ---- numbers and words --------------------------------------------------

/// How many commands at a time: at least one.
pub(super) fn slots<'de, D: Deserializer<'de>>(from: D) -> Result<u32, D::Error> {
    match u32::deserialize(from)? {
        0 => Err(D::Error::custom("must not be 0")),
        slots => Ok(slots),
    }
}

/// How a command ended: a status that does not change again.
pub(super) fn final_status<'de, D: Deserializer<'de>>(from: D) -> Result<CommandStatus, D::Error> {
    let status = CommandStatus::deserialize(from)?;
    if status.is_final() { Ok(status) } else { Err(D::Error::custom("must be a final status")) }
}

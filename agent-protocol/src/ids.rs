//! Names of things: every identifier on the wire is parsed once, here, and
//! believed everywhere else.
//!
//! There are two families. *Names* are chosen by people (`AgentId`,
//! `TenantId`, …): 1 to 128 characters of `A–Z a–z 0–9 . _ -`, compared
//! byte for byte. *Serials* are minted by machines (`CommandId`, `StreamId`,
//! …): 128 bits, written as a lowercase hyphenated UUID and accepted in no
//! other form, so that two ends never disagree about casing.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// Longest name accepted, in bytes (which are characters: names are ASCII).
pub const NAME_BYTES_MAX: usize = 128;

/// Why a text is not an id. The text itself is not repeated: it may be a
/// megabyte long or hold control characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum IdError {
    /// The text is empty.
    #[error("an id must not be empty")]
    Empty,
    /// The text is longer than [`NAME_BYTES_MAX`].
    #[error("an id has at most 128 characters")]
    TooLong,
    /// The text has a character that names do not have.
    #[error("an id has only the characters A-Z a-z 0-9 . _ -")]
    Character,
    /// The text is not a lowercase hyphenated UUID.
    #[error("must be a lowercase hyphenated UUID")]
    NotUuid,
}

fn check_name(text: &str) -> Result<(), IdError> {
    if text.is_empty() {
        return Err(IdError::Empty);
    }
    if text.len() > NAME_BYTES_MAX {
        return Err(IdError::TooLong);
    }
    let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
    if text.bytes().all(allowed) { Ok(()) } else { Err(IdError::Character) }
}

struct Parsed<T>(std::marker::PhantomData<T>);

impl<T: FromStr<Err = IdError>> de::Visitor<'_> for Parsed<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an id")
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<T, E> {
        text.parse().map_err(E::custom)
    }
}

macro_rules! name {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        ///
        /// Cloning shares the text.
        #[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(Arc<str>);

        impl $name {
            /// The text of the name.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = IdError;
            fn from_str(text: &str) -> Result<Self, IdError> {
                check_name(text)?;
                Ok(Self(text.into()))
            }
        }

        impl TryFrom<&str> for $name {
            type Error = IdError;
            fn try_from(text: &str) -> Result<Self, IdError> {
                text.parse()
            }
        }

        impl TryFrom<String> for $name {
            type Error = IdError;
            fn try_from(text: String) -> Result<Self, IdError> {
                text.parse()
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
                to.serialize_str(&self.0)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
                from.deserialize_str(Parsed(std::marker::PhantomData))
            }
        }
    };
}

name! {
    /// An agent, unique within its tenant. The hub's `connection:ack` is the
    /// last word on it: whatever a process proposed, it goes on under that id.
    AgentId
}
name! {
    /// A dashboard process, unique within its tenant. Clients mint a random
    /// one per process, so that a reconnect is recognised as the same reader.
    DashboardId
}
name! {
    /// A tenant: agents, dashboards, commands and streams of different
    /// tenants do not exist for each other.
    TenantId
}
name! {
    /// A request, minted by whoever asks. Asking again under the same id is
    /// asking the same thing: it is carried out once and answered alike.
    RequestId
}

macro_rules! serial {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(u128);

        impl $name {
            /// A time-ordered id (UUID version 7, RFC 9562 §5.7) from the
            /// wall clock in milliseconds since the epoch and 80 random bits.
            pub fn mint(wall_ms: u64, random: [u8; 10]) -> Self {
                Self(uuid::Builder::from_unix_timestamp_millis(wall_ms, &random).into_uuid().as_u128())
            }

            /// The 128 bits as a number, most significant first.
            pub const fn as_u128(self) -> u128 {
                self.0
            }

            /// The id with these 128 bits.
            pub const fn from_u128(bits: u128) -> Self {
                Self(bits)
            }
        }

        impl FromStr for $name {
            type Err = IdError;
            fn from_str(text: &str) -> Result<Self, IdError> {
                let hyphenated = text.len() == 36 && !text.bytes().any(|b| b.is_ascii_uppercase());
                if !hyphenated {
                    return Err(IdError::NotUuid);
                }
                uuid::Uuid::try_parse(text).map(|u| Self(u.as_u128())).map_err(|_| IdError::NotUuid)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&uuid::Uuid::from_u128(self.0), f)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
                let mut text = [0; uuid::fmt::Hyphenated::LENGTH];
                let uuid = uuid::Uuid::from_u128(self.0);
                to.serialize_str(uuid.hyphenated().encode_lower(&mut text))
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
                from.deserialize_str(Parsed(std::marker::PhantomData))
            }
        }
    };
}

serial! {
    /// A command, minted by whoever requests it.
    CommandId
}
serial! {
    /// One attempt's terminal output, minted by the agent that produces it
    /// and never reused: offsets of a stream name the same bytes for ever.
    StreamId
}
serial! {
    /// One incarnation of an agent process. A restarted agent has another.
    InstanceId
}
serial! {
    /// One incarnation of a hub. Roster revisions count within it.
    HubInstance
}
serial! {
    /// The memory of a command queue. A hub that restarts with its queue
    /// intact keeps the epoch; a hub that forgot its commands has a new one.
    QueueEpoch
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_have_a_closed_alphabet_and_a_bound() {
        for good in ["a", "build-1", "A.b_c-9", &"x".repeat(128)] {
            assert_eq!(good.parse::<AgentId>().unwrap().as_str(), good);
        }
        let long = "x".repeat(129);
        for (bad, why) in [
            ("", IdError::Empty),
            (long.as_str(), IdError::TooLong),
            ("a b", IdError::Character),
            ("../etc", IdError::Character),
            ("é", IdError::Character),
            ("a\0", IdError::Character),
            ("a>b*", IdError::Character),
        ] {
            assert_eq!(bad.parse::<AgentId>(), Err(why), "{bad:?}");
        }
    }

    #[test]
    fn serials_have_one_spelling() {
        let text = "0191d4a8-5a3c-7f00-8000-0123456789ab";
        assert_eq!(text.parse::<CommandId>().unwrap().to_string(), text);
        for bad in [
            "0191D4A8-5a3c-7f00-8000-0123456789ab",
            "0191d4a85a3c7f0080000123456789ab",
            "{0191d4a8-5a3c-7f00-8000-0123456789ab}",
            "urn:uuid:0191d4a8-5a3c-7f00-8000-0123456789ab",
            "",
        ] {
            assert_eq!(bad.parse::<CommandId>(), Err(IdError::NotUuid), "{bad:?}");
        }
    }

    #[test]
    fn minted_serials_order_by_time() {
        let early = CommandId::mint(1_000, [255; 10]);
        let late = CommandId::mint(1_001, [0; 10]);
        assert!(early < late);
        assert_eq!(uuid::Uuid::from_u128(early.as_u128()).get_version_num(), 7);
    }
}

//! Reading JSON the way this protocol means it: objects are objects, errors
//! name their field, and parsing has a budget.
//!
//! `serde_json` alone accepts an array where a struct belongs, reports a line
//! and column instead of a field, and builds as many values as the text asks
//! for. [`from_slice`] wraps its deserialiser so that structs must be
//! objects, every container is counted against a depth and an item budget,
//! and the path to a failure is noted on the way out.

use std::cell::{Cell, RefCell};
use std::fmt;

use serde::de::{
    DeserializeSeed, Deserializer, EnumAccess, Error as _, MapAccess, SeqAccess, VariantAccess,
    Visitor,
};
use serde::{Deserialize, forward_to_deserialize_any};

use super::{DecodeError, printable};

/// What parsing one message may take.
#[derive(Debug, Clone, Copy)]
pub(super) struct Budget {
    pub(super) depth_max: u32,
    pub(super) items_max: u32,
}

/// Parses all of `json` as a `T`.
pub(super) fn from_slice<'de, T: Deserialize<'de>>(
    json: &'de [u8],
    budget: Budget,
) -> Result<T, DecodeError> {
    let track = Track { budget, items: Cell::new(0), path: RefCell::new(Vec::new()) };
    let mut inner = serde_json::Deserializer::from_slice(json);
    let value = T::deserialize(Strict { inner: &mut inner, track: &track, depth: 0 });
    value
        .and_then(|value| inner.end().map(|()| value))
        .map_err(|error| DecodeError::from_json(&error, &track.path.borrow()))
}

struct Track {
    budget: Budget,
    items: Cell<u32>,
    /// The path to the failure, innermost first.
    path: RefCell<Vec<String>>,
}

impl Track {
    fn count<E: serde::de::Error>(&self) -> Result<(), E> {
        let items = self.items.get() + 1;
        self.items.set(items);
        if items > self.budget.items_max {
            return Err(E::custom("the message has too many elements"));
        }
        Ok(())
    }

    fn enter<E: serde::de::Error>(&self, depth: u32) -> Result<u32, E> {
        if depth >= self.budget.depth_max {
            return Err(E::custom("the message is nested too deeply"));
        }
        Ok(depth + 1)
    }

    fn note(&self, segment: impl FnOnce() -> String) {
        self.path.borrow_mut().push(segment());
    }
}

struct Strict<'t, D> {
    inner: D,
    track: &'t Track,
    depth: u32,
}

impl<'t, D> Strict<'t, D> {
    fn wrap<V>(&self, inner: V) -> Wrapped<'t, V> {
        Wrapped { inner, track: self.track, depth: self.depth }
    }
}

const RAW_VALUE: &str = "$serde_json::private::RawValue";

macro_rules! forward {
    ($($method:ident)*) => {$(
        fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, D::Error> {
            self.inner.$method(visitor)
        }
    )*};
}

impl<'de, D: Deserializer<'de>> Deserializer<'de> for Strict<'_, D> {
    type Error = D::Error;

    forward! {
        deserialize_bool deserialize_i8 deserialize_i16 deserialize_i32 deserialize_i64
        deserialize_u8 deserialize_u16 deserialize_u32 deserialize_u64 deserialize_f32
        deserialize_f64 deserialize_char deserialize_str deserialize_string deserialize_bytes
        deserialize_byte_buf deserialize_unit deserialize_identifier
    }

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, D::Error> {
        let visitor = self.wrap(visitor);
        self.inner.deserialize_any(visitor)
    }

    fn deserialize_ignored_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, D::Error> {
        // What is ignored is still walked, so that the budget covers it.
        self.deserialize_any(visitor)
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, D::Error> {
        let visitor = self.wrap(visitor);
        self.inner.deserialize_option(visitor)
    }

    fn deserialize_unit_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        visitor: V,
    ) -> Result<V::Value, D::Error> {
        self.deserialize_unit(visitor)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        name: &'static str,
        visitor: V,
    ) -> Result<V::Value, D::Error> {
        if name == RAW_VALUE {
            // Captured as text, not built; it is read under a budget later.
            return self.inner.deserialize_newtype_struct(name, visitor);
        }
        let visitor = self.wrap(visitor);
        self.inner.deserialize_newtype_struct(name, visitor)
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, D::Error> {
        let visitor = self.wrap(visitor);
        self.inner.deserialize_seq(visitor)
    }

    fn deserialize_tuple<V: Visitor<'de>>(
        self,
        len: usize,
        visitor: V,
    ) -> Result<V::Value, D::Error> {
        let visitor = self.wrap(visitor);
        self.inner.deserialize_tuple(len, visitor)
    }

    fn deserialize_tuple_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        len: usize,
        visitor: V,
    ) -> Result<V::Value, D::Error> {
        self.deserialize_tuple(len, visitor)
    }

    fn deserialize_map<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, D::Error> {
        let visitor = self.wrap(visitor);
        self.inner.deserialize_map(visitor)
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        _fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, D::Error> {
        // A map, not a struct: serde_json would accept an array for a struct.
        self.deserialize_map(visitor)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        name: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, D::Error> {
        let visitor = self.wrap(visitor);
        self.inner.deserialize_enum(name, variants, visitor)
    }
}

/// A visitor or an access that keeps what it hands out wrapped.
struct Wrapped<'t, T> {
    inner: T,
    track: &'t Track,
    depth: u32,
}

macro_rules! pass {
    ($($method:ident($type:ty))*) => {$(
        fn $method<E: serde::de::Error>(self, value: $type) -> Result<V::Value, E> {
            self.inner.$method(value)
        }
    )*};
}

impl<'de, V: Visitor<'de>> Visitor<'de> for Wrapped<'_, V> {
    type Value = V::Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.inner.expecting(f)
    }

    pass! {
        visit_bool(bool) visit_i64(i64) visit_u64(u64) visit_f64(f64) visit_str(&str)
        visit_borrowed_str(&'de str) visit_string(String)
    }

    fn visit_unit<E: serde::de::Error>(self) -> Result<V::Value, E> {
        self.inner.visit_unit()
    }

    fn visit_none<E: serde::de::Error>(self) -> Result<V::Value, E> {
        self.inner.visit_none()
    }

    fn visit_some<D: Deserializer<'de>>(self, inner: D) -> Result<V::Value, D::Error> {
        self.inner.visit_some(Strict { inner, track: self.track, depth: self.depth })
    }

    fn visit_newtype_struct<D: Deserializer<'de>>(self, inner: D) -> Result<V::Value, D::Error> {
        self.inner.visit_newtype_struct(Strict { inner, track: self.track, depth: self.depth })
    }

    fn visit_seq<A: SeqAccess<'de>>(self, inner: A) -> Result<V::Value, A::Error> {
        let depth = self.track.enter(self.depth)?;
        self.inner.visit_seq(Elements { inner, track: self.track, depth, index: 0 })
    }

    fn visit_map<A: MapAccess<'de>>(self, inner: A) -> Result<V::Value, A::Error> {
        let depth = self.track.enter(self.depth)?;
        self.inner.visit_map(Members { inner, track: self.track, depth, key: String::new() })
    }

    fn visit_enum<A: EnumAccess<'de>>(self, inner: A) -> Result<V::Value, A::Error> {
        self.inner.visit_enum(Wrapped { inner, track: self.track, depth: self.depth })
    }
}

struct Elements<'t, A> {
    inner: A,
    track: &'t Track,
    depth: u32,
    index: usize,
}

impl<'de, A: SeqAccess<'de>> SeqAccess<'de> for Elements<'_, A> {
    type Error = A::Error;

    fn next_element_seed<T: DeserializeSeed<'de>>(
        &mut self,
        seed: T,
    ) -> Result<Option<T::Value>, A::Error> {
        let seed = Wrapped { inner: seed, track: self.track, depth: self.depth };
        let element = self.inner.next_element_seed(seed).inspect_err(|_| {
            self.track.note(|| format!("[{}]", self.index));
        })?;
        if element.is_some() {
            self.index += 1;
            self.track.count()?;
        }
        Ok(element)
    }
}

struct Members<'t, A> {
    inner: A,
    track: &'t Track,
    depth: u32,
    key: String,
}

impl<'de, A: MapAccess<'de>> MapAccess<'de> for Members<'_, A> {
    type Error = A::Error;

    fn next_key_seed<K: DeserializeSeed<'de>>(
        &mut self,
        seed: K,
    ) -> Result<Option<K::Value>, A::Error> {
        self.key.clear();
        let key = self.inner.next_key_seed(Keep { inner: seed, key: &mut self.key })?;
        if key.is_some() {
            self.track.count()?;
        }
        Ok(key)
    }

    fn next_value_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<T::Value, A::Error> {
        let seed = Wrapped { inner: seed, track: self.track, depth: self.depth };
        self.inner.next_value_seed(seed).inspect_err(|_| {
            self.track.note(|| std::mem::take(&mut self.key));
        })
    }
}

impl<'de, T: DeserializeSeed<'de>> DeserializeSeed<'de> for Wrapped<'_, T> {
    type Value = T::Value;

    fn deserialize<D: Deserializer<'de>>(self, inner: D) -> Result<T::Value, D::Error> {
        self.inner.deserialize(Strict { inner, track: self.track, depth: self.depth })
    }
}

impl<'de, 't, A: EnumAccess<'de>> EnumAccess<'de> for Wrapped<'t, A> {
    type Error = A::Error;
    type Variant = Wrapped<'t, A::Variant>;

    fn variant_seed<T: DeserializeSeed<'de>>(
        self,
        seed: T,
    ) -> Result<(T::Value, Self::Variant), A::Error> {
        let (value, inner) = self.inner.variant_seed(seed)?;
        Ok((value, Wrapped { inner, track: self.track, depth: self.depth }))
    }
}

impl<'de, A: VariantAccess<'de>> VariantAccess<'de> for Wrapped<'_, A> {
    type Error = A::Error;

    fn unit_variant(self) -> Result<(), A::Error> {
        self.inner.unit_variant()
    }

    fn newtype_variant_seed<T: DeserializeSeed<'de>>(self, seed: T) -> Result<T::Value, A::Error> {
        let depth = self.track.enter(self.depth)?;
        self.inner.newtype_variant_seed(Wrapped { inner: seed, track: self.track, depth })
    }

    fn tuple_variant<V: Visitor<'de>>(self, _: usize, _: V) -> Result<V::Value, A::Error> {
        Err(A::Error::custom("must not be an array"))
    }

    fn struct_variant<V: Visitor<'de>>(
        self,
        _: &'static [&'static str],
        _: V,
    ) -> Result<V::Value, A::Error> {
        Err(A::Error::custom("must not be an object"))
    }
}

/// Reads a key and keeps what may be repeated of it for the path.
struct Keep<'k, T> {
    inner: T,
    key: &'k mut String,
}

impl<T> Keep<'_, T> {
    fn keep(self, key: &str) -> T {
        self.key.extend(printable(key));
        self.inner
    }
}

impl<'de, T: DeserializeSeed<'de>> DeserializeSeed<'de> for Keep<'_, T> {
    type Value = T::Value;

    fn deserialize<D: Deserializer<'de>>(self, inner: D) -> Result<T::Value, D::Error> {
        self.inner.deserialize(Keep { inner, key: self.key })
    }
}

impl<'de, D: Deserializer<'de>> Deserializer<'de> for Keep<'_, D> {
    type Error = D::Error;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, D::Error> {
        self.inner.deserialize_str(Keep { inner: visitor, key: self.key })
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option
        unit unit_struct newtype_struct seq tuple tuple_struct map struct enum identifier
        ignored_any
    }
}

impl<'de, V: Visitor<'de>> Visitor<'de> for Keep<'_, V> {
    type Value = V::Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.inner.expecting(f)
    }

    fn visit_str<E: serde::de::Error>(self, key: &str) -> Result<V::Value, E> {
        self.keep(key).visit_str(key)
    }

    fn visit_borrowed_str<E: serde::de::Error>(self, key: &'de str) -> Result<V::Value, E> {
        self.keep(key).visit_borrowed_str(key)
    }

    fn visit_string<E: serde::de::Error>(self, key: String) -> Result<V::Value, E> {
        self.keep(&key).visit_string(key)
    }
}

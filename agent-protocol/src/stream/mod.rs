//! Offset-addressed streams.

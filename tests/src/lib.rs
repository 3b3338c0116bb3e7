//! The simulated World.

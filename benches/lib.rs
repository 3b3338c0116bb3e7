//! What the benchmarks share: a load of an agent and its dashboards, servers as
//! processes, and figures. Linux only.

#[cfg(target_os = "linux")]
#[path = "common/load.rs"]
pub mod load;
#[cfg(target_os = "linux")]
#[path = "common/measure.rs"]
pub mod measure;
#[cfg(target_os = "linux")]
#[path = "common/process.rs"]
pub mod process;
#[cfg(target_os = "linux")]
#[path = "common/wire.rs"]
pub mod wire;

//! `ramtorchd`: owns the jobs, the parameter stores and the worker processes of one machine.
//!
//! ```text
//!  clients ──► rpc ──► supervisor (one task owns all state) ──► world ──► process (spawner thread) ──► workers
//!                          ▲                                     │ disk (writer thread), engine, segment registry
//!                          └──────────── answers ────────────────┘
//!  workers ──► rpc::worker ┘
//! ```
//! The same program is the worker (`worker`): the daemon starts itself again for each device. The daemon's half never
//! opens a user's file, never loads CUDA, and never blocks its state task.
#![forbid(unsafe_code)]

pub mod access;
pub mod cli;
pub mod config;
pub mod daemon;
pub mod devices;
mod disk;
pub mod faults;
#[cfg(fuzzing)]
pub mod fuzzing;
mod gpus;
mod journal;
mod logs;
pub mod node;
mod notify;
mod process;
mod recovery;
mod rpc;
pub mod run;
mod socket;
mod statedir;
pub mod supervisor;
pub mod telemetry;
pub mod worker;
mod world;

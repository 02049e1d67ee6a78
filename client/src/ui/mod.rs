//! A running job, shown to people and to programs.

mod follow;

pub use follow::{FollowOptions, Format, Interrupt, JobEnd, follow};

//! A running job, shown to people and to programs; and how numbers, tables and text are written.

mod follow;
mod plot;
mod series;
mod summary;
pub mod table;
mod terminal;
pub mod text;
mod tracker;
mod view;

pub use follow::{FollowOptions, Format, Interrupt, JobEnd, exit_code_of, follow, has_ended};

//! Log lines as journald wants them: `<4>` before each line is its level, and time and process are the journal's own to add.
//! `journalctl -u ramtorchd -p warning` then shows what its name says.

use crate::config::LogFormat;
use std::fmt::{self, Write};
use std::os::fd::AsFd;
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::fmt::FmtContext;
use tracing_subscriber::fmt::format::{Format, FormatEvent, FormatFields, Writer};
use tracing_subscriber::registry::LookupSpan;

/// The format for where standard error goes.
pub fn format_of_stderr() -> LogFormat {
    // DEVICE:INODE of the stream that the service manager has connected to the journal; see systemd.exec(5).
    let stream = std::env::var("JOURNAL_STREAM").unwrap_or_default();
    let own = nix::sys::stat::fstat(std::io::stderr().as_fd()).map(|s| format!("{}:{}", s.st_dev, s.st_ino));
    if own.is_ok_and(|own| own == stream) { LogFormat::Journal } else { LogFormat::Text }
}

/// Writes events with their level in front.
#[derive(Debug, Clone, Copy)]
pub struct Lines;

impl<S, N> FormatEvent<S, N> for Lines
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, context: &FmtContext<'_, S, N>, mut writer: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let mut text = String::new();
        let plain = Format::default().without_time().with_level(false).with_target(false).with_ansi(false);
        plain.format_event(context, Writer::new(&mut text), event)?;
        prefixed(*event.metadata().level(), &text, &mut writer)
    }
}

fn prefixed(level: Level, text: &str, out: &mut dyn Write) -> fmt::Result {
    // The numbers of syslog(3).
    let number = match level {
        Level::ERROR => 3,
        Level::WARN => 4,
        Level::INFO => 6,
        Level::DEBUG | Level::TRACE => 7,
    };
    // Journald takes every line for a message.
    text.lines().try_for_each(|line| writeln!(out, "<{number}>{line}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_line_has_its_level() {
        let mut out = String::new();
        prefixed(Level::WARN, "one\n  two\n", &mut out).unwrap();
        prefixed(Level::ERROR, "three", &mut out).unwrap();
        assert_eq!(out, "<4>one\n<4>  two\n<3>three\n");
    }

    #[test]
    fn a_whole_event_is_formatted() {
        use std::sync::{Arc, Mutex};
        #[derive(Clone, Default)]
        struct Sink(Arc<Mutex<Vec<u8>>>);
        impl std::io::Write for Sink {
            fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
                self.0.lock().unwrap().extend_from_slice(bytes);
                Ok(bytes.len())
            }
            fn flush(&mut self) -> std::io::Result<()> {
                Ok(())
            }
        }
        let sink = Sink::default();
        let writer = sink.clone();
        let subscriber = tracing_subscriber::fmt().with_writer(move || writer.clone()).event_format(Lines).finish();
        tracing::subscriber::with_default(subscriber, || tracing::warn!(job = "abc", "it is late"));
        let text = String::from_utf8(sink.0.lock().unwrap().clone()).unwrap();
        assert!(text.starts_with("<4>") && text.contains("it is late") && text.contains("job=\"abc\""), "{text}");
    }
}

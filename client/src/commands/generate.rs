//! `ramtorch generate`

use super::{Precision, precision_name};
use crate::cli::Global;
use crate::output::Printer;
use crate::source;
use clap::Args;
use ramtorch_client::ui::text;
use ramtorch_client::{ClientError, Events, exit, json, v1};
use std::io::IsTerminal;
use std::path::PathBuf;

/// Generate text; without a prompt option, the standard input is the prompt
#[derive(Debug, Args)]
pub(crate) struct Generate {
    /// Model folder or checkpoint, or id or name of a job (`job:NAME` where a folder has the same name)
    source: String,

    /// Text to go on from; several prompts are worked on at once
    #[arg(long, short, value_name = "TEXT", allow_hyphen_values = true)]
    prompt: Vec<String>,

    /// File with one prompt a line
    #[arg(long, value_name = "FILE")]
    prompts_file: Option<PathBuf>,

    /// Tokens to generate for each prompt
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..))]
    max_new_tokens: u32,

    /// 0 takes the likeliest token each time
    #[arg(long, value_name = "T", default_value_t = 0.8, value_parser = temperature)]
    temperature: f64,

    /// Keep the K likeliest tokens (0: all)
    #[arg(long, value_name = "K", default_value_t = 0)]
    top_k: u32,

    /// Keep the likeliest tokens whose probabilities add up to P
    #[arg(long, value_name = "P", default_value_t = 1.0, value_parser = share)]
    top_p: f64,

    /// Seed of the sampling
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,

    /// Put each prompt through the model's chat template, as one user turn
    #[arg(long)]
    chat: bool,

    /// Arithmetic [default: the device's own]
    #[arg(long, value_enum)]
    precision: Option<Precision>,
}

fn temperature(text: &str) -> Result<f64, String> {
    text.parse().ok().filter(|t: &f64| (0.0..=100.0).contains(t)).ok_or_else(|| "not a number from 0 to 100".to_owned())
}

fn share(text: &str) -> Result<f64, String> {
    text.parse().ok().filter(|p: &f64| *p > 0.0 && *p <= 1.0).ok_or_else(|| "not a number above 0 and up to 1".to_owned())
}

impl Generate {
    pub async fn run(&self, global: &Global, printer: Printer) -> Result<u8, ClientError> {
        let model = Some(source::model_source(&self.source)?);
        let mut client = global.connect().await?;
        let prompts = self.prompts(printer).await?;
        let request = v1::GenerateRequest {
            model,
            prompts: prompts.clone(),
            max_new_tokens: self.max_new_tokens,
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            seed: self.seed,
            chat: self.chat,
            precision: precision_name(self.precision),
        };
        let events = client.generate(request).await?;
        let streams = prompts.len() == 1 && !printer.is_json();
        let done = receive(events, prompts.len(), streams.then_some(printer)).await?;
        if streams {
            printer.raw(b"\n")?;
        } else {
            printer.result(|| answer(&prompts, &done), || page(&prompts, &done))?;
        }
        // What came before the first token says nothing about the pace.
        let pace = match done.decode_tokens {
            0 => format!("{} tok/s", text::rate(done.new_tokens as f64 / done.seconds)),
            n => format!("{} tok/s after the first", text::rate(n as f64 / done.decode_seconds)),
        };
        let count = text::plural(done.new_tokens, "token");
        printer.remark(&format!("{count} in {} ({pace})", text::duration(done.seconds)));
        Ok(exit::OK)
    }

    async fn prompts(&self, printer: Printer) -> Result<Vec<String>, ClientError> {
        let mut prompts = self.prompt.clone();
        if let Some(file) = &self.prompts_file {
            prompts.extend(source::prompts_file(file)?);
        } else if prompts.is_empty() {
            if std::io::stdin().is_terminal() {
                printer.remark("reading the prompt from the keyboard; Ctrl-D ends it");
            }
            // On a thread of its own: Ctrl-C works while it waits.
            let read = tokio::task::spawn_blocking(source::prompt_from_stdin).await;
            prompts.push(read.map_err(|e| ClientError::Protocol(e.to_string()))??);
        }
        if prompts.is_empty() {
            return Err(ClientError::Usage("there is no prompt in the file".to_owned()));
        }
        Ok(prompts)
    }
}

/// Reads to the end; with a printer, text is written as it comes. Returned texts are as many as the prompts.
async fn receive(mut events: Events<v1::GenerateEvent>, prompts: usize, live: Option<Printer>) -> Result<v1::GenerateDone, ClientError> {
    let mut parts = vec![String::new(); prompts];
    while let Some(event) = events.next().await? {
        match event.event {
            Some(v1::generate_event::Event::Token(token)) => {
                let Some(part) = parts.get_mut(token.prompt as usize) else {
                    return Err(ClientError::Protocol(format!("text for prompt {} of {prompts}", token.prompt)));
                };
                part.push_str(&token.text);
                if let Some(printer) = live {
                    printer.raw(text::printable(&token.text).as_bytes())?;
                }
            }
            Some(v1::generate_event::Event::Done(mut done)) => {
                // What came in parts is what was shown; a daemon may send the text with the end only.
                let streamed = !parts[0].is_empty();
                if done.texts.len() != prompts {
                    done.texts = parts;
                }
                if let (Some(printer), false) = (live, streamed) {
                    printer.raw(text::printable(&done.texts[0]).as_bytes())?;
                }
                return Ok(done);
            }
            None => {}
        }
    }
    Err(ClientError::Protocol("the text ended without a last word".to_owned()))
}

fn answer(prompts: &[String], done: &v1::GenerateDone) -> serde_json::Value {
    let mut value = json::generated(done);
    value["prompts"] = prompts.into();
    value
}

fn page(prompts: &[String], done: &v1::GenerateDone) -> String {
    let pairs = prompts.iter().zip(&done.texts).enumerate();
    let one = |(i, (prompt, generated)): (usize, (&String, &String))| {
        let gap = if i == 0 { "" } else { "\n" };
        format!("{gap}[{}] {}\n{}\n", i + 1, text::one_line(prompt), text::indent(&text::printable(generated), "    "))
    };
    pairs.map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sampling_options_have_limits() {
        assert_eq!(temperature("0"), Ok(0.0));
        assert_eq!(share("1"), Ok(1.0));
        for wrong in ["-0.1", "nan", "inf", "x", "101"] {
            assert!(temperature(wrong).is_err(), "{wrong}");
        }
        for wrong in ["0", "1.01", "nan", ""] {
            assert!(share(wrong).is_err(), "{wrong}");
        }
    }
}

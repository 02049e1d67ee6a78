//! Reading and checking a job file.

use crate::{DataFormat, GradientPlace, JobSpec, OneOrMany};
use std::path::{Path, PathBuf};

/// Steps whose gradients a parameter store can keep.
const WRITE_BACK_STEPS_MAX: u32 = 8;

/// What is wrong with a job file, where, and what to do.
#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    /// Not TOML, an unknown key, or a value of the wrong type; the text has line and column.
    #[error("{file}: {detail}")]
    Parse {
        /// The job file.
        file: String,
        /// The parser's message with line and column.
        detail: String,
    },
    /// A value that cannot work.
    #[error("{file}{}: `{key}`: {detail}", line.map(|l| format!(", line {l}")).unwrap_or_default())]
    Value {
        /// The job file.
        file: String,
        /// Dotted key.
        key: String,
        /// Its line, from 1, where it is written in the file.
        line: Option<usize>,
        /// What is wrong and what would be right.
        detail: String,
    },
}

impl JobSpec {
    /// Parses and checks `text`. Relative paths are resolved against `base_dir`, which must be absolute;
    /// `file` is for messages.
    pub fn parse(text: &str, base_dir: &Path, file: &str) -> Result<JobSpec, SpecError> {
        let mut spec: JobSpec =
            toml::from_str(text).map_err(|e| SpecError::Parse { file: file.into(), detail: e.to_string().trim_end().to_string() })?;
        spec.check().map_err(|(key, detail)| SpecError::Value { file: file.into(), line: line_of(text, &key), key, detail })?;
        spec.resolve(base_dir);
        Ok(spec)
    }

    /// The same job as TOML with absolute paths.
    pub fn to_toml(&self) -> String {
        toml::to_string_pretty(self).unwrap_or_default()
    }

    fn resolve(&mut self, base: &Path) {
        let fix = |p: &mut Option<PathBuf>| {
            if let Some(p) = p {
                *p = absolute(base, p);
            }
        };
        for p in [&mut self.model.path, &mut self.model.config, &mut self.model.weights, &mut self.model.tokenizer] {
            fix(p);
        }
        for p in [&mut self.data.cache, &mut self.checkpoint.path, &mut self.output.path, &mut self.output.metrics] {
            fix(p);
        }
        let fix_all = |list: &mut OneOrMany| match list {
            OneOrMany::One(s) => *s = absolute(base, Path::new(s)).to_string_lossy().into_owned(),
            OneOrMany::Many(v) => v.iter_mut().for_each(|s| *s = absolute(base, Path::new(s)).to_string_lossy().into_owned()),
        };
        fix_all(&mut self.data.train);
        if let Some(v) = &mut self.data.validation {
            fix_all(v);
        }
    }

    fn check(&self) -> Result<(), (String, String)> {
        let no = |key: &str, detail: String| Err((key.to_string(), detail));
        if self.name.is_empty()
            || self.name.len() > 64
            || !self.name.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c))
            || self.name.starts_with('.')
        {
            return no("name", format!("{:?} must be 1 to 64 letters, digits, `.`, `_` or `-`, not starting with a dot", self.name));
        }
        let m = &self.model;
        match [m.path.is_some(), m.config.is_some(), m.layers.is_some()].iter().filter(|x| **x).count() {
            1 => {}
            0 => return no("model", "give `path` (a Hugging Face folder), `config` (a config.json) or `layers` (a plain stack)".into()),
            _ => return no("model", "give only one of `path`, `config` and `layers`".into()),
        }
        if let Some(l) = &m.layers {
            if l.len() < 2 || l.contains(&0) || l.iter().any(|w| *w > 1 << 20) {
                return no("model.layers", "needs two or more widths between 1 and 1048576".into());
            }
        }
        let stack = m.layers.is_some();
        if m.weights.is_some() && !stack {
            return no("model.weights", "belongs to a plain stack (`layers`); a Hugging Face model names its folder in `path`".into());
        }
        let d = &self.data;
        if stack != (d.format == DataFormat::Tensors) {
            return no(
                "data.format",
                if stack {
                    "a plain stack (`model.layers`) trains on \"tensors\"".into()
                } else {
                    "\"tensors\" is for plain stacks (`model.layers`); a language model takes text, jsonl, parquet or tokens".into()
                },
            );
        }
        if d.train.iter().next().is_none() || d.train.iter().any(str::is_empty) {
            return no("data.train", "names no file".into());
        }
        if d.sequence_length == 0 || d.sequence_length > 1 << 24 {
            return no("data.sequence_length", format!("{} is not between 1 and 16777216", d.sequence_length));
        }
        if !(0.0..1.0).contains(&d.validation_fraction) {
            return no("data.validation_fraction", format!("{} is not in [0, 1)", d.validation_fraction));
        }
        let t = &self.train;
        match (t.steps, t.epochs) {
            (None, None) => return no("train", "give `steps` or `epochs`".into()),
            (Some(_), Some(_)) => return no("train.epochs", "give only one of `steps` and `epochs`".into()),
            (Some(0), _) => return no("train.steps", "must be at least 1".into()),
            (Some(n), _) if n > 1 << 40 => return no("train.steps", format!("{n} is more than 2^40")),
            (_, Some(e)) if !(e > 0.0 && e <= 1e6) => return no("train.epochs", format!("{e} is not above 0 and at most 1000000")),
            _ => {}
        }
        if t.batch_size == 0 || t.batch_size > 1 << 24 {
            return no("train.batch_size", format!("{} is not between 1 and 16777216", t.batch_size));
        }
        if let Some(mb) = t.micro_batch_size {
            if mb == 0 || mb > t.batch_size {
                return no("train.micro_batch_size", format!("{mb} is not between 1 and batch_size ({})", t.batch_size));
            }
        }
        if t.groups == Some(0) {
            return no("train.groups", "must be at least 1".into());
        }
        if let Some(gib) = t.held_state_gib.filter(|gib| !(0.0..=1e6).contains(gib)) {
            return no("train.held_state_gib", format!("{gib} is not between 0 and 1000000"));
        }
        if let Some(n) = t.write_back_steps.filter(|n| !(1..=WRITE_BACK_STEPS_MAX).contains(n)) {
            return no("train.write_back_steps", format!("{n} is not between 1 and {WRITE_BACK_STEPS_MAX}"));
        }
        if t.gradients_in == Some(GradientPlace::Device) && self.device.ranks.is_some_and(|n| n > 1) {
            return no(
                "train.gradients_in",
                "\"device\" is for one rank alone: set [device] ranks = 1, or leave gradients in the segment".into(),
            );
        }
        let o = &self.optimizer;
        for (key, v, ok) in [
            ("optimizer.lr", o.lr, o.lr.is_finite() && o.lr >= 0.0),
            ("optimizer.eps", o.eps, o.eps.is_finite() && o.eps >= 0.0),
            ("optimizer.weight_decay", o.weight_decay, o.weight_decay.is_finite() && o.weight_decay >= 0.0),
            ("optimizer.clip_norm", o.clip_norm, o.clip_norm.is_finite() && o.clip_norm >= 0.0),
        ] {
            if !ok {
                return no(key, format!("{v} must be a finite number, zero or more"));
            }
        }
        if o.early_updates == Some(true) && o.clip_norm > 0.0 {
            return no(
                "optimizer.early_updates",
                "true needs clip_norm = 0: the factor of a step's gradients is not known before the last of them has come".into(),
            );
        }
        if o.betas.iter().any(|b| !(0.0..1.0).contains(b)) {
            return no("optimizer.betas", format!("{:?} must each be in [0, 1)", o.betas));
        }
        let s = &self.schedule;
        if !(0.0..=1.0).contains(&s.min_lr_ratio) {
            return no("schedule.min_lr_ratio", format!("{} is not in [0, 1]", s.min_lr_ratio));
        }
        if let Some(steps) = t.steps {
            if s.warmup_steps > steps {
                return no("schedule.warmup_steps", format!("{} is more than train.steps ({steps})", s.warmup_steps));
            }
        }
        let c = &self.checkpoint;
        if (c.every_steps > 0 || c.at_end) && c.path.is_none() {
            return no("checkpoint.path", "is needed where checkpoints are written".into());
        }
        if let Some(gib) = c.staging_gib.filter(|gib| !(0.0..=1e6).contains(gib)) {
            return no("checkpoint.staging_gib", format!("{gib} is not between 0 and 1000000"));
        }
        if let Some(p) = &self.sample {
            if !(p.temperature >= 0.0 && p.temperature.is_finite()) {
                return no("sample.temperature", format!("{} must be zero or more", p.temperature));
            }
            if !(p.top_p > 0.0 && p.top_p <= 1.0) {
                return no("sample.top_p", format!("{} is not in (0, 1]", p.top_p));
            }
        }
        if self.device.ranks == Some(0) {
            return no("device.ranks", "must be at least 1".into());
        }
        Ok(())
    }
}

fn absolute(base: &Path, p: &Path) -> PathBuf {
    if p.is_absolute() { p.to_path_buf() } else { base.join(p) }
}

/// The line (from 1) on which dotted `key` is set, for messages about a value that parsed.
fn line_of(text: &str, key: &str) -> Option<usize> {
    let (table, leaf) = key.rsplit_once('.').unwrap_or(("", key));
    let mut current = String::new();
    for (i, line) in text.lines().enumerate() {
        let line = line.trim();
        if let Some(head) = line.strip_prefix('[').and_then(|l| l.split(']').next()) {
            current = head.trim().to_string();
            if current == key {
                return Some(i + 1);
            }
        } else if let Some((name, _)) = line.split_once('=') {
            let name = name.trim().trim_matches('"');
            let dotted = if current.is_empty() { name.to_string() } else { format!("{current}.{name}") };
            if dotted == key || (current == table && name == leaf) {
                return Some(i + 1);
            }
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const GOOD: &str = "name = \"a\"\n[model]\npath = \"m\"\n[data]\nformat = \"tokens\"\ntrain = \"t.bin\"\nsequence_length = 8\n[train]\nsteps = 3\nbatch_size = 2\n";

    fn parse(text: &str) -> Result<JobSpec, SpecError> {
        JobSpec::parse(text, Path::new("/base"), "job.toml")
    }

    #[test]
    fn relative_paths_start_at_the_base() {
        let s = parse(GOOD).unwrap();
        assert_eq!(s.model.path.as_deref(), Some(Path::new("/base/m")));
        assert_eq!(s.data.train.iter().collect::<Vec<_>>(), ["/base/t.bin"]);
        assert_eq!(JobSpec::parse(&s.to_toml(), Path::new("/"), "again").unwrap(), s);
    }

    #[test]
    fn unknown_keys_name_key_and_line() {
        let e = parse(&GOOD.replace("steps = 3", "stepz = 3")).unwrap_err().to_string();
        assert!(e.contains("stepz") && e.contains("line 9"), "{e}");
        let e = parse(&format!("{GOOD}[optimizer]\nlearning_rate = 1\n")).unwrap_err().to_string();
        assert!(e.contains("learning_rate") && e.contains("line 12"), "{e}");
    }

    #[test]
    fn bad_values_name_key_and_line() {
        for (from, to, key, line) in [
            ("batch_size = 2", "batch_size = 0", "train.batch_size", 10),
            ("batch_size = 2", "batch_size = 2\nmicro_batch_size = 3", "train.micro_batch_size", 11),
            ("steps = 3", "steps = 3\nepochs = 1", "train.epochs", 10),
            ("name = \"a\"", "name = \"a/b\"", "name", 1),
            ("path = \"m\"", "path = \"m\"\nconfig = \"c\"", "model", 2),
            ("sequence_length = 8", "sequence_length = 0", "data.sequence_length", 7),
            ("batch_size = 2", "batch_size = 2\n[checkpoint]\nstaging_gib = -1", "checkpoint.staging_gib", 12),
            ("batch_size = 2", "batch_size = 2\n[optimizer]\nearly_updates = true", "optimizer.early_updates", 12),
            ("batch_size = 2", "batch_size = 2\nheld_state_gib = -1", "train.held_state_gib", 11),
            ("batch_size = 2", "batch_size = 2\nwrite_back_steps = 9", "train.write_back_steps", 11),
            ("batch_size = 2", "batch_size = 2\ngradients_in = \"device\"\n[device]\nranks = 2", "train.gradients_in", 11),
            ("batch_size = 2", "batch_size = 2\n[checkpoint]\nstaging_gib = nan", "checkpoint.staging_gib", 12),
        ] {
            let e = parse(&GOOD.replace(from, to)).unwrap_err().to_string();
            assert!(e.contains(&format!("`{key}`")) && e.contains(&format!("line {line}")), "{to}: {e}");
        }
    }

    proptest! {
        #[test]
        fn never_panics(text in "\\PC{0,200}") {
            let _ = parse(&text);
        }
        #[test]
        fn never_panics_on_damaged_files(at in 0usize..GOOD.len(), byte in 0u8..128) {
            let mut b = GOOD.as_bytes().to_vec();
            b[at] = byte;
            let _ = parse(&String::from_utf8_lossy(&b));
        }
    }
}

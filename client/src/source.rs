//! Names that users give: model sources, files, job files.

use ramtorch_client::{ClientError, exit, v1};
use std::io::Read;
use std::path::{Path, PathBuf};

/// Largest job file, in bytes.
const JOB_FILE_BYTES_MAX: u64 = 1 << 20;
/// Largest prompt file or standard input, in bytes; what a request may carry is a little more.
const PROMPT_BYTES_MAX: u64 = 8 << 20;

/// Where a model is read from, as given on the command line: `job:NAME` and `path:FOLDER` say so themselves; else a
/// name with a `/`, or of something that exists here, is a folder, and any other a job.
pub(crate) fn model_source(text: &str) -> Result<v1::ModelSource, ClientError> {
    use v1::model_source::Source;
    let source = if let Some(job) = text.strip_prefix("job:") {
        Source::Job(job.to_owned())
    } else if let Some(path) = text.strip_prefix("path:") {
        Source::Path(absolute(path)?)
    } else if text.contains('/') || Path::new(text).exists() {
        Source::Path(absolute(text)?)
    } else {
        Source::Job(text.to_owned())
    };
    if matches!(&source, Source::Job(name) if name.is_empty()) {
        return Err(ClientError::Usage("SOURCE is empty: give a model folder, or the id or name of a job".to_owned()));
    }
    Ok(v1::ModelSource { source: Some(source) })
}

/// A path as the daemon, which has another working directory, understands it.
pub(crate) fn absolute(path: &str) -> Result<String, ClientError> {
    let made = std::path::absolute(path).map_err(|e| ClientError::Usage(format!("cannot use the path {path:?}: {e}")))?;
    made.into_os_string()
        .into_string()
        .map_err(|_| ClientError::Usage(format!("the folder of {path:?} has a name that is not UTF-8; rename it")))
}

/// A job file (`-`: standard input) as a request. Relative paths in it start at its own folder.
pub(crate) fn job_file(path: &Path, dry_run: bool) -> Result<v1::SubmitRequest, ClientError> {
    let is_stdin = path == Path::new("-");
    let bytes = if is_stdin { read_stdin(JOB_FILE_BYTES_MAX) } else { read_file(path, JOB_FILE_BYTES_MAX) };
    let job_toml = bytes.and_then(text).map_err(|source| ClientError::Read {
        what: "job file",
        path: path.to_owned(),
        source,
        exit_code: exit::JOB_FILE,
    })?;
    let unusable = |why: String| ClientError::Usage(format!("cannot use the folder of {}: {why}", path.display()));
    let file = std::path::absolute(path).map_err(|e| unusable(e.to_string()))?;
    // For "-" this is the working directory too: the parent of the absolute path of a file "-".
    let base_dir = file.parent().unwrap_or(&file).to_str().ok_or_else(|| unusable("its name is not UTF-8".to_owned()))?.to_owned();
    let file_name = if is_stdin { "<stdin>".to_owned() } else { path.display().to_string() };
    Ok(v1::SubmitRequest { job_toml, base_dir, file_name, dry_run })
}

/// Prompts of a file, one a line; empty lines are skipped.
pub(crate) fn prompts_file(path: &Path) -> Result<Vec<String>, ClientError> {
    let content = read_file(path, PROMPT_BYTES_MAX).and_then(text).map_err(|source| ClientError::Read {
        what: "prompts",
        path: path.to_owned(),
        source,
        exit_code: exit::INPUT,
    })?;
    Ok(content.lines().filter(|line| !line.trim().is_empty()).map(str::to_owned).collect())
}

/// One prompt: the whole standard input without its last newline.
pub(crate) fn prompt_from_stdin() -> Result<String, ClientError> {
    let mut content = read_stdin(PROMPT_BYTES_MAX).and_then(text).map_err(|source| ClientError::Read {
        what: "prompt from",
        path: PathBuf::from("the standard input"),
        source,
        exit_code: exit::INPUT,
    })?;
    if content.ends_with('\n') {
        content.pop();
    }
    Ok(content)
}

fn read_file(path: &Path, bytes_max: u64) -> std::io::Result<Vec<u8>> {
    bounded(std::fs::File::open(path)?, bytes_max)
}

fn read_stdin(bytes_max: u64) -> std::io::Result<Vec<u8>> {
    bounded(std::io::stdin().lock(), bytes_max)
}

fn bounded(source: impl Read, bytes_max: u64) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    // One byte more than allowed tells a file that is too long from one that just fits.
    source.take(bytes_max + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > bytes_max {
        return Err(std::io::Error::other(format!("it is longer than {} MiB", bytes_max >> 20)));
    }
    Ok(bytes)
}

fn text(bytes: Vec<u8>) -> std::io::Result<String> {
    String::from_utf8(bytes).map_err(|e| std::io::Error::other(format!("it is not UTF-8 (byte {})", e.utf8_error().valid_up_to())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use v1::model_source::Source;

    fn source(text: &str) -> Source {
        model_source(text).unwrap().source.unwrap()
    }

    #[test]
    fn a_source_is_a_folder_or_a_job() {
        let here = std::env::current_dir().unwrap();
        assert_eq!(source("/models/a"), Source::Path("/models/a".into()));
        assert_eq!(source("models/a"), Source::Path(here.join("models/a").to_str().unwrap().into()));
        assert_eq!(source("Cargo.toml"), Source::Path(here.join("Cargo.toml").to_str().unwrap().into()), "it exists");
        assert_eq!(source("austen"), Source::Job("austen".into()));
        assert_eq!(source("job:Cargo.toml"), Source::Job("Cargo.toml".into()));
        assert_eq!(source("path:austen"), Source::Path(here.join("austen").to_str().unwrap().into()));
        for empty in ["", "job:", "path:"] {
            assert_eq!(model_source(empty).unwrap_err().exit_code(), exit::USAGE, "{empty:?}");
        }
    }

    #[test]
    fn a_job_file_brings_its_folder() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("job.toml");
        std::fs::write(&path, "name = \"x\"").unwrap();
        let request = job_file(&path, true).unwrap();
        assert_eq!(
            (request.base_dir.as_str(), request.job_toml.as_str(), request.dry_run),
            (folder.path().to_str().unwrap(), "name = \"x\"", true)
        );
    }

    #[test]
    fn a_job_file_that_cannot_be_one_is_refused_here() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("job.toml");
        assert!(job_file(&path, false).unwrap_err().to_string().contains("No such file"));
        std::fs::write(&path, b"name = \"\xff\"").unwrap();
        assert!(job_file(&path, false).unwrap_err().to_string().contains("not UTF-8 (byte 8)"));
        std::fs::write(&path, vec![b'#'; (JOB_FILE_BYTES_MAX + 1) as usize]).unwrap();
        let error = job_file(&path, false).unwrap_err();
        assert!(error.to_string().contains("longer than 1 MiB"));
        assert_eq!(error.exit_code(), exit::JOB_FILE);
        assert_eq!(job_file(folder.path(), false).unwrap_err().exit_code(), exit::JOB_FILE, "a folder");
    }

    #[test]
    fn prompts_are_lines() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("prompts");
        std::fs::write(&path, "one\n\n  two\r\n \n").unwrap();
        assert_eq!(prompts_file(&path).unwrap(), ["one", "  two"]);
    }
}

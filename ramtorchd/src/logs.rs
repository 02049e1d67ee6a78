//! Log files of a job's workers: `rank-N.gG.log`, one for each rank and generation, and `prepare.gG.log`.

use ramtorch_proto::v1::LogChunk;
use std::collections::BTreeMap;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

/// Most bytes in one piece.
const CHUNK_BYTES: usize = 64 << 10;

/// What the name of a log file says. Ordered as the files were written, ranks apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct LogName {
    /// Generation of the gang, or of the gang that is prepared.
    pub generation: u64,
    /// Of a member of the gang, and not of the preparing worker before it.
    pub gang: bool,
    /// Rank; the preparing worker counts as rank 0.
    pub rank: u32,
}

impl LogName {
    /// Reads a file name; `None` for other files.
    pub fn parse(name: &str) -> Option<LogName> {
        let (who, generation) = name.strip_suffix(".log")?.rsplit_once(".g")?;
        let generation = generation.parse().ok()?;
        match who.strip_prefix("rank-") {
            Some(rank) => Some(LogName { generation, gang: true, rank: rank.parse().ok()? }),
            None => (who == "prepare").then_some(LogName { generation, gang: false, rank: 0 }),
        }
    }
}

/// Reads the logs of one job piece by piece, and what is added to them.
#[derive(Debug)]
pub struct LogReader {
    dir: PathBuf,
    rank: Option<u32>,
    files: BTreeMap<LogName, u64>,
}

impl LogReader {
    /// The logs in `dir`, of all ranks or of one.
    pub fn new(dir: PathBuf, rank: Option<u32>) -> LogReader {
        LogReader { dir, rank, files: BTreeMap::new() }
    }

    /// Starts so that, for each rank, only the last `lines` lines of what is there are read (0: all of it).
    pub fn skip_to_tail(&mut self, lines: u32) {
        self.look();
        if lines == 0 {
            return;
        }
        let ranks: std::collections::BTreeSet<u32> = self.files.keys().map(|n| n.rank).collect();
        for rank in ranks {
            let mut wanted = u64::from(lines);
            let names: Vec<LogName> = self.files.keys().filter(|n| n.rank == rank).rev().copied().collect();
            for name in names {
                let (offset, found) = match wanted {
                    0 => (u64::MAX, 0),
                    n => tail_offset(&self.path(name), n),
                };
                let end = std::fs::metadata(self.path(name)).map_or(0, |m| m.len());
                self.files.insert(name, offset.min(end));
                wanted -= found;
            }
        }
    }

    /// What has been added since the last call, the oldest generation first; empty when there is nothing new.
    pub fn read(&mut self) -> Vec<LogChunk> {
        self.look();
        let mut chunks = Vec::new();
        let names: Vec<LogName> = self.files.keys().copied().collect();
        for name in names {
            let path = self.path(name);
            let Some(offset) = self.files.get_mut(&name) else { continue };
            let Ok(data) = read_at(&path, *offset) else { continue };
            if !data.is_empty() {
                *offset += data.len() as u64;
                chunks.push(LogChunk { rank: name.rank, data });
            }
        }
        chunks
    }

    fn path(&self, name: LogName) -> PathBuf {
        let LogName { generation, gang, rank } = name;
        self.dir.join(if gang { format!("rank-{rank}.g{generation}.log") } else { format!("prepare.g{generation}.log") })
    }

    fn look(&mut self) {
        for entry in std::fs::read_dir(&self.dir).into_iter().flatten().flatten() {
            let Some(name) = entry.file_name().to_str().and_then(LogName::parse) else { continue };
            if self.rank.is_none_or(|r| r == name.rank) {
                self.files.entry(name).or_insert(0);
            }
        }
    }
}

fn read_at(path: &Path, offset: u64) -> std::io::Result<Vec<u8>> {
    let mut file = std::fs::File::open(path)?;
    file.seek(SeekFrom::Start(offset))?;
    let mut data = Vec::new();
    file.take(CHUNK_BYTES as u64).read_to_end(&mut data)?;
    Ok(data)
}

/// Where the last `lines` lines of a file start, and how many there are. Reads backwards, in pieces.
fn tail_offset(path: &Path, lines: u64) -> (u64, u64) {
    let search = || -> std::io::Result<(u64, u64)> {
        let mut file = std::fs::File::open(path)?;
        let length = file.metadata()?.len();
        let (mut found, mut end) = (0u64, length);
        let mut buffer = vec![0u8; CHUNK_BYTES];
        while end > 0 {
            let start = end.saturating_sub(CHUNK_BYTES as u64);
            let piece = &mut buffer[..(end - start) as usize];
            file.seek(SeekFrom::Start(start))?;
            file.read_exact(piece)?;
            for (i, byte) in piece.iter().enumerate().rev() {
                let at = start + i as u64;
                // The newline at the very end closes the last line and opens none.
                if *byte == b'\n' && at + 1 < length {
                    found += 1;
                    if found == lines {
                        return Ok((at + 1, lines));
                    }
                }
            }
            end = start;
        }
        Ok((0, if length > 0 { found + 1 } else { 0 }))
    };
    search().unwrap_or((0, 0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn all(reader: &mut LogReader) -> Vec<(u32, String)> {
        let mut out = Vec::new();
        loop {
            let chunks = reader.read();
            if chunks.is_empty() {
                return out;
            }
            out.extend(chunks.into_iter().map(|c| (c.rank, String::from_utf8(c.data).unwrap())));
        }
    }

    #[test]
    fn generations_come_in_order_and_additions_later() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
        write("rank-0.g10.log", "new\n");
        write("rank-0.g2.log", "old\n");
        write("prepare.g2.log", "prepare\n");
        write("rank-1.g2.log", "other\n");
        write("junk", "x");
        let mut reader = LogReader::new(dir.path().into(), Some(0));
        let texts: Vec<String> = all(&mut reader).into_iter().map(|c| c.1).collect();
        assert_eq!(texts, ["prepare\n", "old\n", "new\n"]);
        write("rank-0.g10.log", "new\nmore\n");
        write("rank-0.g11.log", "newest\n");
        let texts: Vec<String> = all(&mut reader).into_iter().map(|c| c.1).collect();
        assert_eq!(texts, ["more\n", "newest\n"]);
    }

    #[test]
    fn the_tail_spans_generations() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("rank-0.g1.log"), "a\nb\nc\n").unwrap();
        std::fs::write(dir.path().join("rank-0.g2.log"), "d\n").unwrap();
        let tail = |n| {
            let mut r = LogReader::new(dir.path().into(), None);
            r.skip_to_tail(n);
            all(&mut r).into_iter().map(|c| c.1).collect::<String>()
        };
        assert_eq!(tail(2), "c\nd\n");
        assert_eq!(tail(1), "d\n");
        assert_eq!(tail(9), "a\nb\nc\nd\n");
        assert_eq!(tail(0), "a\nb\nc\nd\n");
    }

    proptest! {
        #[test]
        fn the_tail_is_that_of_the_lines(text in "[a\\n]{0,60}", lines in 1u64..20) {
            let file = tempfile::NamedTempFile::new().unwrap();
            std::fs::write(file.path(), &text).unwrap();
            let (offset, found) = tail_offset(file.path(), lines);
            let all: Vec<&str> = text.split_inclusive('\n').collect();
            let expected: String = all[all.len().saturating_sub(lines as usize)..].concat();
            prop_assert_eq!(&text[offset as usize..], expected);
            prop_assert_eq!(found, (all.len() as u64).min(lines));
        }

        #[test]
        fn names_are_read_back(generation in any::<u64>(), rank in any::<u32>(), junk in "\\PC{0,20}") {
            let name = LogName { generation, gang: true, rank };
            prop_assert_eq!(LogName::parse(&format!("rank-{rank}.g{generation}.log")), Some(name));
            let _ = LogName::parse(&junk);
        }
    }
}

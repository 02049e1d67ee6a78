//! The files of a model folder that are not weights: configuration and tokenizer, kept to be written beside them again.

use crate::error::ModelError;
use crate::files::read_limited;
use std::path::Path;

/// Longest such file that is read, in bytes.
const MAX_ASSET_BYTES: u64 = 256 << 20;
/// The model's configuration.
pub(crate) const CONFIG: &str = "config.json";
const GENERATION: &str = "generation_config.json";
const TOKENIZER: &str = "tokenizer.json";
/// How text becomes prompts: travels with any tokenizer of the same vocabulary.
const TOKENIZER_SETTINGS: [&str; 5] =
    ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json"];
/// Vocabularies in other formats.
const VOCABULARIES: [&str; 3] = ["vocab.json", "merges.txt", "tokenizer.model"];

/// Configuration and tokenizer files, in memory: what is exported at the end of a run is what it began with, whatever
/// happens to the folder meanwhile.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ModelAssets {
    /// Text of config.json; none for a plain stack.
    pub config: Option<Vec<u8>>,
    /// Name and content of the other files.
    pub files: Vec<(String, Vec<u8>)>,
}

impl ModelAssets {
    /// The files of a model folder, a checkpoint folder, or the folder of a config.json. `tokenizer` replaces the folder's
    /// tokenizer.json, together with the settings and vocabularies that lie beside it.
    ///
    /// # Errors
    /// A file that is there cannot be read, or is longer than 256 MiB. Files that are not there are left out.
    pub fn from_folder(folder: &Path, tokenizer: Option<&Path>) -> Result<ModelAssets, ModelError> {
        let mut assets = ModelAssets { config: read_if_present(&folder.join(CONFIG))?, files: Vec::new() };
        assets.add(GENERATION, &folder.join(GENERATION))?;
        let Some(tokenizer) = tokenizer else {
            for name in [TOKENIZER].iter().chain(&TOKENIZER_SETTINGS).chain(&VOCABULARIES) {
                assets.add(name, &folder.join(name))?;
            }
            return Ok(assets);
        };
        if !assets.add(TOKENIZER, tokenizer)? {
            return Err(ModelError::read(tokenizer, std::io::ErrorKind::NotFound.into()));
        }
        let beside = crate::durable::parent(tokenizer);
        for name in TOKENIZER_SETTINGS {
            if !assets.add(name, &beside.join(name))? {
                assets.add(name, &folder.join(name))?;
            }
        }
        for name in VOCABULARIES {
            assets.add(name, &beside.join(name))?;
        }
        Ok(assets)
    }

    /// The files of the folder in which the configuration file `config` lies, under whatever name it has there.
    ///
    /// # Errors
    /// As [`ModelAssets::from_folder`], or there is no such file.
    pub fn from_config(config: &Path, tokenizer: Option<&Path>) -> Result<ModelAssets, ModelError> {
        let mut assets = Self::from_folder(crate::durable::parent(config), tokenizer)?;
        assets.config = Some(read_limited(config, crate::config::MAX_CONFIG_BYTES)?);
        Ok(assets)
    }

    /// Content of a file other than config.json.
    pub fn file(&self, name: &str) -> Option<&[u8]> {
        self.files.iter().find(|(n, _)| n == name).map(|(_, bytes)| bytes.as_slice())
    }

    /// All files, config.json first.
    pub(crate) fn all(&self) -> impl Iterator<Item = (&str, &[u8])> {
        let config = self.config.as_deref().map(|bytes| (CONFIG, bytes));
        config.into_iter().chain(self.files.iter().map(|(name, bytes)| (name.as_str(), bytes.as_slice())))
    }

    /// Whether a file of this name is one that model folders have beside their weights.
    pub(crate) fn is_known(name: &str) -> bool {
        [CONFIG, GENERATION, TOKENIZER].contains(&name) || TOKENIZER_SETTINGS.contains(&name) || VOCABULARIES.contains(&name)
    }

    fn add(&mut self, name: &str, path: &Path) -> Result<bool, ModelError> {
        let content = read_if_present(path)?;
        let found = content.is_some();
        self.files.extend(content.map(|bytes| (name.to_owned(), bytes)));
        Ok(found)
    }
}

fn read_if_present(path: &Path) -> Result<Option<Vec<u8>>, ModelError> {
    if !path.is_file() {
        return Ok(None);
    }
    read_limited(path, MAX_ASSET_BYTES).map(Some)
}

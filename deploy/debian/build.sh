#!/usr/bin/env bash
# Builds the Debian package from binaries that are there: deploy/debian/build.sh [FOLDER_OF_BINARIES] [OUTPUT_FOLDER]
# MAINTAINER="Name <address>" names who answers for it.
# `cargo build --release` makes them in target/release. Needs dpkg-deb; no root.
set -euo pipefail
cd "$(dirname "$0")/../.."
binaries=${1:-${CARGO_TARGET_DIR:-target}/release}
output=${2:-.}
version=$(sed -n '/^\[workspace.package\]/,/^\[/s/^version = "\(.*\)"/\1/p' Cargo.toml)
architecture=$(dpkg --print-architecture)
root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
umask 022
chmod 0755 "$root"

put() { install -D -m "$1" "$2" "$root/$3"; }
for program in ramtorchd ramtorch; do
  put 0755 "$binaries/$program" "usr/bin/$program"
  strip --strip-unneeded "$root/usr/bin/$program"
done
put 0644 deploy/ramtorchd.service usr/lib/systemd/system/ramtorchd.service
put 0644 deploy/ramtorch-shm-huge.service usr/lib/systemd/system/ramtorch-shm-huge.service
put 0644 deploy/ramtorch.sysusers usr/lib/sysusers.d/ramtorch.conf
put 0644 deploy/ramtorch.tmpfiles usr/lib/tmpfiles.d/ramtorch.conf
put 0644 deploy/ramtorchd.toml etc/ramtorch/ramtorchd.toml
put 0644 deploy/grafana-dashboard.json usr/share/ramtorch/grafana-dashboard.json
put 0644 deploy/prometheus-rules.yml usr/share/ramtorch/prometheus-rules.yml
for page in docs/*.md README.md; do put 0644 "$page" "usr/share/doc/ramtorch/$(basename "$page")"; done
put 0644 deploy/debian/copyright usr/share/doc/ramtorch/copyright
put 0644 CHANGELOG.md usr/share/doc/ramtorch/CHANGELOG.md
maintainer=${MAINTAINER:-$(sed -n 's/^Maintainer: //p' deploy/debian/control)}
date=$(git log -1 --format=%cD 2>/dev/null || date -R)
printf 'ramtorch (%s) unstable; urgency=medium\n\n  * See CHANGELOG.md.\n\n -- %s  %s\n' "$version" "$maintainer" "$date" |
  gzip -9n > "$root/usr/share/doc/ramtorch/changelog.gz"
mkdir -p "$root/usr/share/bash-completion/completions"
"$binaries/ramtorch" completion bash > "$root/usr/share/bash-completion/completions/ramtorch"

mkdir -p "$root/DEBIAN"
# What the programs are linked with; CUDA's libraries are opened at run time.
glibc=$(objdump -T "$root"/usr/bin/* | grep -o 'GLIBC_[0-9.]*' | sort -uV | tail -1 | cut -d_ -f2)
needed=$(objdump -p "$root"/usr/bin/* | awk '/NEEDED/ { print $2 }' | sort -u)
depends="libc6 (>= $glibc), adduser"
case "$needed" in *libgcc_s*) depends="$depends, libgcc-s1" ;; esac
case "$needed" in *libstdc++*) depends="$depends, libstdc++6" ;; esac
sed -e "s/^Maintainer: .*/Maintainer: $maintainer/" -e "s/@VERSION@/$version/" -e "s/@ARCHITECTURE@/$architecture/" -e "s/@DEPENDS@/$depends/" \
  -e "s/@SIZE@/$(du -sk "$root" | cut -f1)/" deploy/debian/control > "$root/DEBIAN/control"
echo /etc/ramtorch/ramtorchd.toml > "$root/DEBIAN/conffiles"
for script in postinst prerm postrm; do install -m 0755 "deploy/debian/$script" "$root/DEBIAN/$script"; done
(cd "$root" && find usr -type f -print0 | sort -z | xargs -0 md5sum) > "$root/DEBIAN/md5sums"
mkdir -p "$output"
dpkg-deb --root-owner-group -Zxz --build "$root" "$output/ramtorch_${version}_${architecture}.deb"

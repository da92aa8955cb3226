# Builder: unpacks one Debian package into $out and makes it independent of
# the machine's own files. In: deb, package, revision, search (store paths
# that may be referred to), out.
set -euo pipefail
shopt -s nullglob dotglob

triplet=$(dpkg-architecture -qDEB_HOST_MULTIARCH 2>/dev/null || gcc -print-multiarch 2>/dev/null || echo "$(uname -m)-linux-gnu")
root=$PWD/root
dpkg-deb -x "$deb" "$root"
mkdir -p "$out"

# usr/ is the top; what lies beside it (lib, bin, etc) is merged in.
for dir in "$root/usr" "$root"; do
	for entry in "$dir"/*; do
		[ "$entry" = "$root/usr" ] || cp -a --remove-destination "$entry" "$out/"
	done
done
chmod -R u+w,ug-s,-t "$out"
[ -z "$revision" ] || echo "revision $revision" >"$out/revision"

# find_in PATH: the first of $out and $search that has it.
find_in() {
	local dir
	for dir in "$out" $search; do
		if [ -e "$dir/$1" ]; then
			echo "$dir/$1"
			return
		fi
	done
	return 1
}

# Alternatives, which Debian's maintainer scripts would have linked.
libs=$out/lib/$triplet
[ ! -e "$libs/blas/libblas.so.3" ] || ln -s blas/libblas.so.3 "$libs/libblas.so.3"
[ ! -e "$libs/lapack/liblapack.so.3" ] || ln -s lapack/liblapack.so.3 "$libs/liblapack.so.3"

# Links: into the store where the target is known, gone where they would
# lead to the machine's own files.
while IFS= read -r -d '' link; do
	target=$(readlink "$link")
	case $target in
	/*) rel=${target#/} ;;
	*)
		[ ! -e "$link" ] || continue
		rel=$(realpath -ms "${link%/*}/$target")
		rel=${rel#"$out"/}
		;;
	esac
	if found=$(find_in "${rel#usr/}"); then
		ln -sfn "$found" "$link"
	elif [[ $target == /* ]]; then
		rm "$link"
	fi
done < <(find "$out" -type l -print0)

# soname -> directory, of everything that may be linked against.
declare -A provider
# First those that a package keeps to itself, or to its family.
for dir in $search "$out"; do
	for lib in "$dir/lib/$triplet"/*/*.so*; do
		provider[${lib##*/}]=${lib%/*}
	done
done
for dir in $search "$out"; do
	for lib in "$dir/lib/$triplet"/*.so* "$dir/lib"/*.so*; do
		provider[${lib##*/}]=${lib%/*}
	done
done
loader=$(for dir in "$out" $search; do printf '%s\n' "$dir/lib/$triplet"/ld-linux-*.so.*; done | grep . | head -n 1 || true)

patch_elf() {
	local file=$1 soname dir rpath=
	# The C library is found by its own means, and breaks when rewritten.
	[[ $package == libc6 && $file != "$out"/bin/* && $file != "$out"/sbin/* ]] && return
	# Static programs and plain object files have no dynamic section.
	needed=$(patchelf --print-needed "$file" 2>/dev/null) || return 0
	[ -n "$needed" ] || return 0
	for soname in $needed; do
		[[ $soname == ld-linux* ]] && continue
		dir=${provider[$soname]:-}
		if [ -z "$dir" ]; then
			# A plugin of a program that Debian lets you do without.
			[[ $file != "$out/lib/$triplet"/*/* || -e ${file%/*}/$soname ]] || return 0
			[ -e "${file%/*}/$soname" ] || { echo "$package: $file needs $soname, which no dependency has" >&2; exit 1; }
			dir=${file%/*}
		fi
		[[ :$rpath: == *:$dir:* ]] || rpath=$rpath${rpath:+:}$dir
	done
	if [ -n "$loader" ] && patchelf --print-interpreter "$file" >/dev/null 2>&1; then
		patchelf --set-interpreter "$loader" --set-rpath "$rpath" "$file"
	else
		patchelf --set-rpath "$rpath" "$file"
	fi
}

patch_shebang() {
	local file=$1 line interpreter args name found
	IFS= read -r line <"$file" || return 0
	read -r interpreter args <<<"${line#\#!}"
	name=${interpreter##*/}
	[ "$name" != env ] || { name=${args%% *}; args=; }
	[ "$name" != sh ] || name=dash
	[ "$name" != perl ] || [ -z "$perl" ] || { sed -i "1s|.*|#!$perl${args:+ $args}|" "$file"; return; }
	found=$(find_in "bin/$name") || return 0
	sed -i "1s|.*|#!$found${args:+ $args}|" "$file"
}

# The perl with all its modules, not perl-base's, where there is one.
perl=
for dir in $search; do
	[[ $dir != *-perl-5* ]] || perl=$dir/bin/perl
done

while IFS= read -r -d '' file; do
	LC_ALL=C IFS= read -r -N 4 magic <"$file" 2>/dev/null || continue
	case $magic in
	$'\x7fELF') patch_elf "$file" ;;
	'#!'*) patch_shebang "$file" ;;
	esac
done < <(find "$out" -type f -size +15c -print0)

# wrap FILE PROGRAM LINE...: FILE becomes a script that sets what LINE... sets
# and runs PROGRAM.
wrap() {
	local file=$1 program=$2 shell
	shift 2
	shell=$(find_in bin/dash)
	mkdir -p "${file%/*}"
	rm -f "$file"
	{
		echo "#!$shell"
		printf 'export %s\n' "$@"
		echo "exec $program \"\$@\""
	} >"$file"
	chmod 555 "$file"
}

# perl_path prints every module directory of $out and $search.
perl_path() {
	local dir modules path=
	for dir in "$out" $search; do
		for modules in "$dir/lib/$triplet"/perl5/5.* "$dir/share/perl5" "$dir/lib/$triplet"/perl/5.* "$dir"/share/perl/5.* "$dir/lib/$triplet/perl-base"; do
			[ ! -d "$modules" ] || [ -L "$modules" ] || path=$path${path:+:}$modules
		done
	done
	echo "$path"
}

# Programs that must be told where their files are, and alternatives that
# Debian's maintainer scripts would have linked.
[ -z "$fix" ] || source "$fix"

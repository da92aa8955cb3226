# Builder: one directory that holds a C compiler: links to the programs, headers
# and libraries of the packages in $search, and bin/gcc, which knows where they are.
set -euo pipefail
shopt -s nullglob

triplet=$(uname -m)-linux-gnu
mkdir -p "$out/bin" "$out/lib/$triplet"
for dir in $search; do
	[ ! -d "$dir/include" ] || cp -as --no-clobber "$dir/include" "$out/"
	[ ! -d "$dir/lib/gcc" ] || cp -as --no-clobber "$dir/lib/gcc" "$out/lib/"
	for file in "$dir/lib/$triplet"/*.o "$dir/lib/$triplet"/*.a "$dir/lib/$triplet"/*.so*; do
		cp -as --no-clobber "$file" "$out/lib/$triplet/"
	done
	for program in as ld ld.bfd ar nm ranlib strip objcopy; do
		[ ! -e "$dir/bin/$program" ] || ln -sfn "$(readlink -f "$dir/bin/$program")" "$out/bin/$program"
	done
	for program in "$dir/bin/$triplet"-gcc-[0-9]*; do
		driver=$program
	done
	[ ! -x "$dir/bin/dash" ] || shell=$dir/bin/dash
	for file in "$dir/lib/$triplet"/ld-linux-*.so.*; do
		loader=$file
	done
done
chmod -R u+w "$out"

# Linker scripts name files by where Debian has them.
for script in "$out/lib/$triplet"/*.so; do
	! head -c 200 "$script" | grep -aq 'GNU ld script' || {
		sed -E "s|(/usr)?/lib(64)?/($triplet/)?|$out/lib/$triplet/|g" "$script" >"$script.new"
		mv "$script.new" "$script"
	}
done
ln -sfn "$loader" "$out/lib/$triplet/${loader##*/}"

inner=$(echo "$out/lib/gcc/$triplet"/[0-9]*)
cat >"$out/bin/gcc" <<END
#!$shell
export GCC_EXEC_PREFIX=$out/lib/gcc/
exec $driver -B$inner/ -B$out/bin/ -B$out/lib/$triplet/ -nostdinc -isystem $inner/include \\
	-isystem $out/include/$triplet -isystem $out/include -L$inner -L$out/lib/$triplet \\
	-Wl,-dynamic-linker,$loader -Wl,-rpath,${loader%/*} "\$@"
END
chmod 555 "$out/bin/gcc"

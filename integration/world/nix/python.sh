# Builder: one directory that holds all of Python: links to the files of the
# packages in $search, compiled modules, and bin/python3, which knows where it
# is.
set -euo pipefail
shopt -s nullglob

mkdir -p "$out/bin" "$out/lib"
for dir in $search; do
	for lib in "$dir"/lib/python3*; do
		cp -as --no-clobber "$lib" "$out/lib/"
	done
	for program in "$dir"/bin/python3.[0-9]*; do
		[[ $program == *-config ]] || python=$program
	done
	[ ! -x "$dir/bin/dash" ] || shell=$dir/bin/dash
done
chmod -R u+w "$out/lib"

cat >"$out/bin/python3" <<END
#!$shell
export PYTHONHOME=$out
exec $python "\$@"
END
chmod 555 "$out/bin/python3"

# Sources have no time stamps that mean anything: what is compiled is valid
# for as long as the store path is.
env -i "$out/bin/python3" -m compileall -q -j 0 --invalidation-mode unchecked-hash \
	-x '/(tests?|idlelib|lib2to3|f2py|distutils)/' "$out/lib" || true

// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Light mixed work without an end, for something to be seen in a trace: reads
 * of proc and tmpfs files, a directory listing, a pipe between two processes,
 * and a pause of a few milliseconds each round.
 *
 *	work
 */
#include <dirent.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <sys/prctl.h>
#include <unistd.h>

static void read_file(const char *path)
{
	char buf[512];
	int fd = open(path, O_RDONLY);

	if (fd < 0)
		return;
	while (read(fd, buf, sizeof(buf)) > 0)
		;
	close(fd);
}

static void list(const char *path)
{
	DIR *dir = opendir(path);

	if (!dir)
		return;
	while (readdir(dir))
		;
	closedir(dir);
}

/* The other end of the pipe: reads a byte at a time. */
static void echo(int fd)
{
	char byte;

	prctl(PR_SET_PDEATHSIG, SIGKILL);
	while (read(fd, &byte, 1) == 1)
		;
	_exit(0);
}

int main(void)
{
	int ends[2];
	int fd;

	if (pipe(ends)) {
		perror("work: pipe");
		return 1;
	}
	if (fork() == 0) {
		close(ends[1]);
		echo(ends[0]);
	}
	close(ends[0]);
	for (;;) {
		read_file("/proc/self/stat");
		read_file("/proc/uptime");
		list("/");
		fd = open("/tmp/work", O_RDWR | O_CREAT, 0600);
		if (fd >= 0) {
			if (write(fd, "work\n", 5) == 5)
				lseek(fd, 0, SEEK_SET);
			close(fd);
		}
		read_file("/tmp/work");
		if (write(ends[1], "x", 1) != 1)
			return 1;
		usleep(5000);
	}
}

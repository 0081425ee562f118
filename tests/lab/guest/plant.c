// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * A guest that is full of false kernels. Needs root, and nothing of the kernel
 * but what root may read: where each page of a process lies (/proc/PID/pagemap),
 * and where the kernel's symbols are (/proc/kallsyms).
 *
 *	plant [NAME=OFFSET]..
 *
 * Takes most of the memory that is free. At each multiple of 2 MiB where the
 * pages are its own that a search from outside looks at, it writes a kernel
 * that passes the search: banners, phys_base, page tables that lead to it, the
 * idle task, the list of functions, and a control block (or a count of ticks)
 * that lives. Elsewhere its banner, and into all other pages false control
 * blocks and false headers of ring buffers. OFFSET is
 * where, from _text on, a symbol is that /proc/kallsyms does not list.
 *
 * Prints "whole N banners N other N", and keeps the hearts beating.
 */
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sysinfo.h>
#include <unistd.h>

#define PAGE		4096UL
#define STEP		(2UL << 20)
#define KERNEL_MAP	0xffffffff80000000UL
#define TABLE		0x3UL		/* present, writable */
#define LARGE		0x83UL
#define MAX_SYMBOLS	(1 << 20)
#define MAX_KERNELS	4096
/* Of what is free, and as long as the machine's memory is less than that */
#define SHARE(free)	((free) / 4 * 3)
#define MAX_PAGES	(1UL << 20)

enum item {
	BANNER, PROC_BANNER, PHYS_BASE, FIVE_LEVELS, INIT_TASK, TABLES,
	NUM_SYMS, RELATIVE_BASE, OFFSETS, CONTROL, KEYS, TICKS, ITEMS
};

static const char *const names[ITEMS] = {
	"linux_banner", "linux_proc_banner", "phys_base", "__pgtable_l5_enabled",
	"init_task", "init_top_pgt", "kallsyms_num_syms", "kallsyms_relative_base",
	"kallsyms_offsets", "xftrace_control", "global_key", "jiffies_64",
};

/* Where each item is in the image, and how long what is written there is */
static uint64_t at[ITEMS], length[ITEMS];
static uint64_t text, base;
static uint32_t *offsets, count;
static char banner[1024];

/* By page frame: where it is mapped here, and which kernel has it */
static char *mapped[MAX_PAGES];
static uint16_t owner[MAX_PAGES];
/* Frames that no kernel needs, for page tables */
static uint64_t spare_next;

static volatile uint64_t *hearts[MAX_KERNELS];
static unsigned int nr_hearts;

static void die(const char *what)
{
	perror(what);
	exit(1);
}

static void read_symbols(void)
{
	FILE *file = fopen("/proc/kallsyms", "r");
	char line[512], name[256];
	uint64_t address, *all = calloc(MAX_SYMBOLS, sizeof(*all));

	if (!file || !all)
		die("plant: /proc/kallsyms");
	base = UINT64_MAX;
	while (fgets(line, sizeof(line), file) && !strchr(line, '[') && count < MAX_SYMBOLS) {
		if (sscanf(line, "%lx %*c %255s", &address, name) != 2)
			continue;
		all[count++] = address;
		if (address >= KERNEL_MAP && address < base)
			base = address;
		if (!strcmp(name, "_text"))
			text = address;
		for (int i = 0; i < ITEMS; i++)
			if (!strcmp(name, names[i]))
				at[i] = address;
	}
	fclose(file);
	for (int i = 0; i < ITEMS; i++)
		at[i] = at[i] ? at[i] - text : 0;
	offsets = calloc(count, sizeof(*offsets));
	if (!offsets)
		die("plant: memory");
	for (uint32_t i = 0; i < count; i++)
		offsets[i] = all[i] < base ? all[i] : (uint32_t)(base - 1 - all[i]);
	free(all);
}

static void take_memory(void)
{
	struct sysinfo info;
	uint64_t size, entry;
	char *start;
	int pagemap = open("/proc/self/pagemap", O_RDONLY);

	if (pagemap < 0 || sysinfo(&info))
		die("plant: pagemap");
	size = SHARE(info.freeram) / PAGE * PAGE;
	start = mmap(NULL, size, PROT_READ | PROT_WRITE,
		     MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
	if (start == MAP_FAILED || mlock(start, size))
		die("plant: memory");
	for (char *page = start; page < start + size; page += PAGE) {
		if (pread(pagemap, &entry, 8, (uintptr_t)page / PAGE * 8) != 8)
			die("plant: pagemap");
		entry &= (1UL << 55) - 1;
		if (entry && entry < MAX_PAGES)
			mapped[entry] = page;
	}
	close(pagemap);
}

/* Where a piece of memory is mapped here, if it is ours and in one page. */
static char *ours(uint64_t physical)
{
	char *page = physical / PAGE < MAX_PAGES ? mapped[physical / PAGE] : NULL;

	return page ? page + physical % PAGE : NULL;
}

static void put(uint64_t physical, const void *bytes, uint64_t len)
{
	while (len) {
		uint64_t now = PAGE - physical % PAGE;
		char *to = ours(physical);

		now = now < len ? now : len;
		if (to)
			memcpy(to, bytes, now);
		physical += now;
		bytes = (const char *)bytes + now;
		len -= now;
	}
}

static void put_u64(uint64_t physical, uint64_t value)
{
	put(physical, &value, sizeof(value));
}

/* A page for tables, from the end of memory. */
static uint64_t spare(uint16_t id)
{
	while (!mapped[spare_next] || owner[spare_next])
		if (--spare_next == 0)
			die("plant: no page is left");
	owner[spare_next] = id;
	memset(mapped[spare_next], 0, PAGE);
	return spare_next * PAGE;
}

/* Whether all pages that kernel needs are ours, and no other kernel's. */
static int is_free(uint64_t start)
{
	for (int i = 0; i < ITEMS; i++) {
		if (!length[i])
			continue;
		for (uint64_t page = (start + at[i]) / PAGE;
		     page <= (start + at[i] + length[i] - 1) / PAGE; page++)
			if (page >= MAX_PAGES || !mapped[page] || owner[page])
				return 0;
	}
	return 1;
}

static void own(uint64_t start, uint16_t id)
{
	for (int i = 0; i < ITEMS; i++)
		for (uint64_t page = (start + at[i]) / PAGE;
		     length[i] && page <= (start + at[i] + length[i] - 1) / PAGE; page++)
			owner[page] = id;
}

static void put_control(uint64_t physical, uint64_t boot_id)
{
	static const uint16_t types[] = { 20, 21, 22, 11, 10 };
	static const uint16_t fields[] = { 64, 40, 56, 88, 80, 128, 136, 144, 152, 0, 48, 0, 8, 16 };

	put_u64(physical, 0x3143525446585f5fUL);
	put_u64(physical + 0x08, 1);
	put_u64(physical + 0x10, boot_id);
	put_u64(physical + 0x18, 64 | 384UL << 32);
	put_u64(physical + 0x20, text + at[KEYS]);
	put_u64(physical + 0x28, 2);
	put(physical + 0x2c, types, sizeof(types));
	put_u64(physical + 0x40, text + at[BANNER] / 8 * 8);
	put_u64(physical + 0x48, 4096);
	put(physical + 0x4c, fields, sizeof(fields));
}

static void put_kernel(uint64_t start, uint16_t id)
{
	uint64_t beats = at[CONTROL] ? at[CONTROL] + 0x80 : at[TICKS];
	uint64_t upper = spare(id), middle = spare(id);
	uint64_t first = (text - KERNEL_MAP) / STEP;
	uint32_t zero = 0;

	put(start + at[BANNER], banner, strlen(banner) + 1);
	put(start + at[PROC_BANNER], "%s version %s", 13);
	put_u64(start + at[PHYS_BASE], start - (text - KERNEL_MAP));
	put(start + at[FIVE_LEVELS], &zero, 4);
	put(start + at[INIT_TASK], "swapper/0", 10);
	if (at[OFFSETS]) {
		put(start + at[OFFSETS], offsets, count * 4UL);
		put(start + at[NUM_SYMS], &count, 4);
		put_u64(start + at[RELATIVE_BASE], base);
	}
	put_u64(start + at[TABLES] + 511 * 8, upper | TABLE);
	put_u64(upper + 510 * 8, middle | TABLE);
	for (uint64_t i = 0; i < 32 && first + i < 512; i++)
		put_u64(middle + (first + i) * 8, (start + i * STEP) | LARGE);
	if (at[CONTROL])
		put_control(start + at[CONTROL], start | 1);
	hearts[nr_hearts++] = (volatile uint64_t *)ours(start + beats);
}

int main(int argc, char **argv)
{
	unsigned long whole = 0, banners = 0, other = 0;
	FILE *version = fopen("/proc/version", "r");

	if (!version || !fgets(banner, sizeof(banner), version))
		die("plant: /proc/version");
	read_symbols();
	for (int arg = 1; arg < argc; arg++)
		for (int i = 0; i < ITEMS; i++) {
			size_t len = strlen(names[i]);

			if (!strncmp(argv[arg], names[i], len) && argv[arg][len] == '=')
				at[i] = strtoul(argv[arg] + len + 1, NULL, 0);
		}
	for (int i = 0; i < ITEMS; i++)
		length[i] = at[i] && i != KEYS && !(i == TICKS && at[CONTROL]) ? 16 : 0;
	length[BANNER] = strlen(banner) + 1;
	length[OFFSETS] = at[OFFSETS] ? count * 4UL : 0;
	length[TABLES] = PAGE;
	length[CONTROL] = at[CONTROL] ? 0x100 : 0;
	take_memory();
	spare_next = MAX_PAGES - 1;
	for (uint64_t page = 1; page < MAX_PAGES; page++) {
		if (!mapped[page])
			continue;
		/* A buffer's page that says that it is full; or a control block. */
		put_u64(page * PAGE, page * 1000);
		put_u64(page * PAGE + 8, 4080);
		if (page % 4 == 1)
			put_u64(page * PAGE, 0xbadfeed | 64UL << 32);
		else if (page % 4 == 2)
			put_control(page * PAGE, page);
		other++;
	}
	for (uint64_t start = 0; start < MAX_PAGES * PAGE && whole < MAX_KERNELS; start += STEP)
		if (is_free(start)) {
			own(start, ++whole);
			put_kernel(start, whole);
		}
	for (uint64_t start = 0; start < MAX_PAGES * PAGE; start += STEP) {
		uint64_t page = (start + at[BANNER]) / PAGE;

		if (page >= MAX_PAGES || !mapped[page])
			continue;
		banners++;
		if (!owner[page])
			put(start + at[BANNER], banner, strlen(banner) + 1);
	}
	printf("whole %lu banners %lu other %lu\n", whole, banners, other);
	fflush(stdout);
	for (;;) {
		for (unsigned int i = 0; i < nr_hearts; i++)
			(*hearts[i])++;
		usleep(5000);
	}
}

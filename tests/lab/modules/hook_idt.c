// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * A benign hook for the lab's guest: the gate of int 0x80 leads to this module,
 * which jumps on to where it led, as SucKIT did with the system calls of its
 * time.
 */
#include <asm/desc.h>

#include "hook.h"

#define GATE 0x80

void hook_idt_entry(void);
unsigned long hook_idt_original;

asm(".pushsection .text\n"
    ".globl hook_idt_entry\n"
    "hook_idt_entry:\n"
    "	jmp *hook_idt_original(%rip)\n"
    ".popsection\n");

static gate_desc *gate;
static gate_desc straight;

static int __init hook_init(void)
{
	gate_desc *table = hook_find("idt_table");
	gate_desc bent;

	if (!table)
		return -ENOENT;
	gate = &table[GATE];
	straight = *gate;
	hook_idt_original = gate_offset(gate);
	bent = straight;
	bent.offset_low = (u16)(unsigned long)hook_idt_entry;
	bent.offset_middle = (u16)((unsigned long)hook_idt_entry >> 16);
	bent.offset_high = (u32)((unsigned long)hook_idt_entry >> 32);
	return hook_poke(gate, &bent, sizeof(bent));
}

static void __exit hook_exit(void)
{
	hook_poke(gate, &straight, sizeof(straight));
}

module_init(hook_init);
module_exit(hook_exit);
MODULE_DESCRIPTION("Lab: bend the gate of int 0x80");
MODULE_LICENSE("GPL");

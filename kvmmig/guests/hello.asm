; hello: prints one line on the serial port and ends
;@ entry long64
;
; On entry rdi is the index of this vCPU, and every vCPU starts here. kvmmig/machine/boot.py tells the rest.

    bits 64
    org 0x100000

SERIAL    equ 0x3f8             ; the 16550's transmit register; its line status register is 5 further on
EXIT      equ 0xf4              ; a byte written here ends the guest with that status

start:
    test rdi, rdi
    jnz idle                            ; one vCPU does the talking
    lea rsi, [rel message]
next_letter:
    movzx ecx, byte [rsi]
    test ecx, ecx
    jz done
wait_until_empty:
    mov dx, SERIAL + 5
    in al, dx
    test al, 0x20                       ; THRE: the transmit register takes another byte
    jz wait_until_empty
    mov dx, SERIAL
    mov al, cl
    out dx, al
    inc rsi
    jmp next_letter
done:
    xor eax, eax
    out EXIT, al
idle:
    pause
    jmp idle

message:
    db "Hello from a KVM guest at privilege level 3.", 10, 0
